"""AlexNet-2012: the whole network, its two towers, and what they say to each other.

recipe -> network (whole) or tower + exchange -> softmax loss -> optimizer, schedule

Nothing here knows where images come from or how processes are started.
"""
