"""Whether this machine is fit to train, and how to mend it where it is not.

examination -> software, gpus, host (and cgroup), network, folders, exchange (which starts swapping), decoding

What the machine is like is found out by functions that take nothing, or a folder; what to think of it is said by
functions named `judge_...`, which see no more than their arguments.
"""
