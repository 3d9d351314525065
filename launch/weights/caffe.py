"""Caffe's bvlc_alexnet: its file of weights, read and turned into what this project's layers compute.

It is not quite the paper's network: windows of response normalisation reach across the towers, k is 1 and alpha is
divided by the window's size; it sees crops of 227 pixels, in BGR; dropout divides in training where the paper
multiplies at test. All of that is kept: crops, k and windows as fields of the recipe, the rest in the weights, exactly.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from launch.errors import UserError
from model.errors import RecipeError
from model.recipe import PAPER, Recipe

# Of caffe.proto: the fields that a network like this needs, by message: name, number, type ("*": repeated).
_LAYER = {"conv": "Convolution", "dropout": "Dropout", "inner_product": "InnerProduct", "lrn": "LRN",
          "pooling": "Pooling", "relu": "ReLU"}
_MESSAGES = {
    "Shape": {"dim": (1, "int64*")},
    "Blob": {"num": (1, "int64"), "channels": (2, "int64"), "height": (3, "int64"), "width": (4, "int64"),
             "data": (5, "float*"), "shape": (7, "Shape"), "double_data": (8, "double*")},
    "Convolution": {"num_output": (1, "int64"), "bias_term": (2, "bool"), "pad": (3, "int64*"),
                    "kernel_size": (4, "int64*"), "group": (5, "int64"), "stride": (6, "int64*"),
                    "dilation": (18, "int64*")},
    "Dropout": {"dropout_ratio": (1, "float")},
    "InnerProduct": {"num_output": (1, "int64"), "bias_term": (2, "bool"), "transpose": (6, "bool")},
    "LRN": {"local_size": (1, "int64"), "alpha": (2, "float"), "beta": (3, "float"), "norm_region": (4, "int64"),
            "k": (5, "float")},
    "Pooling": {"pool": (1, "int64"), "kernel_size": (2, "int64*"), "stride": (3, "int64*"), "pad": (4, "int64*")},
    "ReLU": {"negative_slope": (1, "float")},
    "Layer": {"name": (1, "string"), "type": (2, "string"), "bottom": (3, "string*"), "top": (4, "string*"),
              "blobs": (7, "Blob*"), **{f"{name}_param": (number, kind) for (name, kind), number in zip(
                  _LAYER.items(), (106, 108, 117, 118, 121, 123))}},
    "OldLayer": {"bottom": (2, "string*"), "top": (3, "string*"), "name": (4, "string"), "type": (5, "int64"),
                 "blobs": (6, "Blob*"), **{f"{name}_param": (number, kind) for (name, kind), number in zip(
                     _LAYER.items(), (10, 12, 17, 18, 19, 30))}},
    "Net": {"name": (1, "string"), "layers": (2, "OldLayer*"), "layer": (100, "Layer*")},
}
_OLD_TYPES = {1: "Accuracy", 4: "Convolution", 5: "Data", 6: "Dropout", 12: "ImageData", 14: "InnerProduct", 15: "LRN",
              17: "Pooling", 18: "ReLU", 20: "Softmax", 21: "SoftmaxWithLoss", 22: "Split", 36: "Silence"}
_NOT_COMPUTING = {"Accuracy", "Data", "ImageData", "Input", "Silence", "Softmax", "SoftmaxWithLoss", "Split"}
_ORDER = ["Convolution conv1", "ReLU", "LRN", "Pooling", "Convolution conv2", "ReLU", "LRN", "Pooling",
          "Convolution conv3", "ReLU", "Convolution conv4", "ReLU", "Convolution conv5", "ReLU", "Pooling",
          "InnerProduct fc6", "ReLU", "Dropout", "InnerProduct fc7", "ReLU", "Dropout", "InnerProduct fc8"]
_GEOMETRY = {"conv1": (11, 4, 0, 1), "conv2": (5, 1, 2, 2), "conv3": (3, 1, 1, 1), "conv4": (3, 1, 1, 2),
             "conv5": (3, 1, 1, 2)}  # size, stride, pad, group


def _message(name: str) -> type[Message]:
    """Return the class of a message of _MESSAGES."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe_subset.proto", package="caffe_subset", syntax="proto2")
    field_types = descriptor_pb2.FieldDescriptorProto
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, kind) in fields.items():
            field = message.field.add(name=field_name, number=number)
            field.label = field_types.LABEL_REPEATED if kind.endswith("*") else field_types.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in _MESSAGES:
                field.type, field.type_name = field_types.TYPE_MESSAGE, f".caffe_subset.{kind}"
            else:
                field.type = getattr(field_types, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe_subset.{name}"))


def _parse(path: Path, name: str) -> Message:
    try:
        return _message(name).FromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path}: not a file of Caffe's, or cut short") from None


def caffe_weights(path: Path) -> tuple[dict[str, Tensor], Recipe]:
    """Return the parameters of a bvlc_alexnet.caffemodel, in this project's names and order, and the recipe that
    computes what Caffe does with them. UserError where the file is of another network."""
    net = _parse(path, "Net")
    layers = [(layer, _OLD_TYPES.get(layer.type, str(layer.type))) for layer in net.layers]
    layers = [(layer, kind) for layer, kind in layers or [(layer, layer.type) for layer in net.layer]
              if kind not in _NOT_COMPUTING]
    found = [f"{kind} {layer.name}" if kind in ("Convolution", "InnerProduct") else kind for layer, kind in layers]
    if found != _ORDER:
        pairs = zip_longest(found, _ORDER, fillvalue="nothing")
        at, (what, wanted) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        raise UserError(f"{path}: not bvlc_alexnet: layer {at} of those that compute is {what}, not {wanted}")
    try:
        return _convert(layers)
    except (ValueError, RecipeError) as error:
        raise UserError(f"{path}: not bvlc_alexnet: {error}") from None


def _convert(layers: list[tuple[Message, str]]) -> tuple[dict[str, Tensor], Recipe]:
    """Raises ValueError for what is computed otherwise."""
    tensors, norms, above = {}, [], None
    for layer, kind in layers:
        _require(len(layer.top) == 1 and (above is None or list(layer.bottom) == [above]), layer, "is not in the chain")
        above = layer.top[0]
        if kind == "Convolution":
            p, (size, stride, pad, group) = layer.conv_param, _GEOMETRY[layer.name]
            _require((list(p.kernel_size), list(p.stride) or [1], list(p.pad) or [0], p.group or 1) == (
                [size], [stride], [pad], group) and set(p.dilation) <= {1}, layer, "has another geometry")
            _add_blobs(tensors, layer, p.num_output, (-1, size, size))
        elif kind == "InnerProduct":
            _require(not layer.inner_product_param.transpose, layer, "is transposed")
            _add_blobs(tensors, layer, layer.inner_product_param.num_output, (-1,))
        elif kind == "LRN":
            p = layer.lrn_param
            _require(p.norm_region == 0, layer, "is within channels")
            n, k = p.local_size if p.HasField("local_size") else 5, p.k if p.HasField("k") else 1.0
            alpha, beta = p.alpha if p.HasField("alpha") else 1.0, p.beta if p.HasField("beta") else 0.75
            _require(0 < n < 100, layer, "has an odd window")
            norms.append((n, k, alpha / n, beta))
        elif kind == "Pooling":
            p = layer.pooling_param
            _require((p.pool, list(p.kernel_size), list(p.stride), set(p.pad) | {0}) == (0, [3], [2], {0}), layer,
                     "is no maximum over windows of 3, 2 apart")
        elif kind == "Dropout":
            ratio = layer.dropout_param.dropout_ratio if layer.dropout_param.HasField("dropout_ratio") else 0.5
            _require(ratio == 0.5, layer, "drops another share than 0.5")
        else:
            _require(layer.relu_param.negative_slope == 0, layer, "has a slope below 0")
    if norms[0] != norms[1]:
        raise ValueError("its two response normalisations differ")
    tensors["conv1.weight"] = tensors["conv1.weight"].flip(1).contiguous()  # BGR to RGB
    for name in ("fc7.weight", "fc8.weight"):
        tensors[name] = tensors[name] * 2  # its dropout leaves outputs alone at test, ours halves them: both are exact
    n, k, alpha, beta = norms[0]
    recipe = replace(
        PAPER, name="bvlc_alexnet", crop=227, lrn_n=n, lrn_k=k, lrn_alpha=alpha, lrn_beta=beta, lrn_across_towers=True,
        kernels=tuple(len(tensors[f"{name}.weight"]) for name in _GEOMETRY),
        neurons=tuple(len(tensors[f"{name}.weight"]) for name in ("fc6", "fc7")),
        colour_epochs=0, bias_decay=0.0)
    return tensors, recipe


def _require(fulfilled: bool, layer: Message, otherwise: str) -> None:
    if not fulfilled:
        raise ValueError(f"layer {layer.name} {otherwise}")


def _add_blobs(tensors: dict[str, Tensor], layer: Message, outputs: int, rest: tuple[int, ...]) -> None:
    with np.errstate(over="ignore"):  # what is not finite is told later
        arrays = [np.array(blob.data if len(blob.data) else blob.double_data, np.float32) for blob in layer.blobs]
    _require(outputs > 0 and len(arrays) == 2 and arrays[1].size == outputs and arrays[0].size > 0
             and arrays[0].size % (outputs * abs(int(np.prod(rest)))) == 0, layer, "has no weights and biases that fit")
    tensors[f"{layer.name}.weight"] = torch.from_numpy(arrays[0].reshape(outputs, *rest))
    tensors[f"{layer.name}.bias"] = torch.from_numpy(arrays[1])


def read_mean(path: Path) -> np.ndarray:
    """Return a mean image of Caffe's (.binaryproto) as float32 [256, 256, 3], RGB. UserError where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    blob = _parse(path, "Blob")
    values = np.array(blob.data if len(blob.data) else blob.double_data, np.float32)
    if values.size != 3 * 256 * 256:
        raise UserError(f"{path}: holds {values.size} numbers, and a mean image 3 x 256 x 256")
    return np.ascontiguousarray(values.reshape(3, 256, 256)[::-1].transpose(1, 2, 0))
