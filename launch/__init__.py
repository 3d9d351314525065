"""The `alexnet` command: training, evaluation and everything that ties pipeline and model together."""

__version__ = "0.1.0"
