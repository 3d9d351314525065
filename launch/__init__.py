"""The `alexnet` command: training, evaluation and everything that ties pipeline and model together."""
