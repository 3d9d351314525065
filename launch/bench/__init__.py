"""Speed of the parts, measured: warm-up apart, several repeats, median and spread; peers in the same run."""
