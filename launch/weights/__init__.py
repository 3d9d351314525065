"""Weights in and out: a run <-> a bundle <-> a file of another program.

Tensors are those of the whole network, whoever trained it, float32: conv1.weight [96, 3, 11, 11] (RGB), conv1.bias
[96], conv2.weight [256, 48, 5, 5] (rows of tower 0, then of tower 1, as everywhere), ..., fc8.weight [classes, 4096],
fc8.bias [classes]; and mean [256, 256, 3], the training set's mean image, RGB in 0-255.
"""
