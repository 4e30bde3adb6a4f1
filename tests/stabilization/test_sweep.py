"""Every family of networks in timm and torchvision: all that decimates is found, treated or left with a reason.

Random weights: structure, sizes, keys, and the way back to the bit; what a layer computes is in test_lowpass.py.
"""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from cheap_weights import make_cheap
from torch import Tensor, nn

from mixpool import revert, stabilize
from mixpool.stabilization.flow import tensors_of, trace
from mixpool.stabilization.treat import ORDERS, find_decimators, plan_of, treat, treated_layers, untreat

FAST = """torchvision/resnet18 torchvision/squeezenet1_1 torchvision/mobilenet_v2 torchvision/shufflenet_v2_x0_5
    torchvision/googlenet timm/regnety_002 timm/vit_tiny_patch16_224"""
# Source/model -> how many layers are treated.
TREATED = {
    "torchvision/resnet18": 7,
    "torchvision/resnet50": 7,
    "torchvision/resnext50_32x4d": 7,
    "torchvision/wide_resnet50_2": 7,
    "torchvision/densenet121": 1,
    "torchvision/vgg11": 5,
    "torchvision/vgg16_bn": 5,
    "torchvision/alexnet": 3,
    "torchvision/squeezenet1_0": 3,
    "torchvision/squeezenet1_1": 3,
    "torchvision/googlenet": 4,
    "torchvision/inception_v3": 6,
    "torchvision/regnet_x_400mf": 8,
    "torchvision/regnet_y_400mf": 8,
    "torchvision/efficientnet_b0": 4,
    "torchvision/mobilenet_v2": 4,
    "torchvision/mobilenet_v3_large": 4,
    "torchvision/mnasnet0_5": 4,
    "torchvision/shufflenet_v2_x0_5": 7,
    "torchvision/convnext_tiny": 3,
    "torchvision/maxvit_t": 4,
    "torchvision/swin_t": 0,
    "detection/fasterrcnn_resnet50_fpn": 7,
    "segmentation/deeplabv3_resnet50": 3,
    "segmentation/fcn_resnet50": 3,
    "segmentation/lraspp_mobilenet_v3_large": 3,
    "timm/resnet18": 7,
    "timm/resnet50": 7,
    "timm/resnet26d": 4,
    "timm/resnet50d": 4,
    "timm/resnetaa50": 3,
    "timm/resnetblur50": 3,
    "timm/resnext50_32x4d": 7,
    "timm/seresnet50": 7,
    "timm/legacy_seresnet50": 7,
    "timm/ecaresnetlight": 4,
    "timm/resnest14d": 1,
    "timm/skresnet18": 10,
    "timm/densenet121": 1,
    "timm/vgg11": 5,
    "timm/inception_v3": 6,
    "timm/inception_v4": 10,
    "timm/regnetx_002": 8,
    "timm/regnety_002": 8,
    "timm/efficientnet_b0": 4,
    "timm/tf_efficientnet_b0": 0,
    "timm/mobilenetv2_100": 4,
    "timm/mobilenetv3_small_050": 4,
    "timm/mixnet_s": 12,
    "timm/dpn68": 7,
    "timm/hrnet_w18_small": 22,
    "timm/dla34": 11,
    "timm/res2net50_26w_4s": 13,
    "timm/cspresnet50": 4,
    "timm/cspdarknet53": 5,
    "timm/ese_vovnet19b_dw": 4,
    "timm/selecsls42": 5,
    "timm/xception41": 8,
    "timm/legacy_xception": 8,
    "timm/convnext_tiny": 3,
    "timm/resnetv2_50": 7,
    "timm/nf_resnet50": 1,
    "timm/repvgg_a0": 8,
    "timm/mobileone_s0": 20,
    "timm/ghostnet_100": 8,
    "timm/vit_tiny_patch16_224": 0,
    "timm/swin_tiny_patch4_window7_224": 0,
    "timm/levit_128s": 3,
}
SIZES = ((45, 39), (37, 64))  # odd sides, on which maps of every rest by the stride come up
PARTICULAR = {  # those that take other images, or of one size alone
    "torchvision/alexnet": ((75, 91), (67, 80)),
    "torchvision/inception_v3": ((75, 91), (79, 80)),
    "timm/inception_v3": ((75, 91), (79, 80)),
    "timm/inception_v4": ((75, 91), (79, 80)),
    "torchvision/maxvit_t": ((224, 224),),
    "timm/resnetaa50": ((64, 64), (96, 64)),
    "timm/hrnet_w18_small": ((64, 64), (96, 64)),
    "timm/dla34": ((64, 64), (96, 64)),
    "timm/vit_tiny_patch16_224": ((224, 224),),
    "timm/swin_tiny_patch4_window7_224": ((224, 224),),
    "timm/levit_128s": ((224, 224),),
}
# Why a layer may be left.
REASONS = {
    "it reads the image",
    "it averages already",
    "it cuts the image into patches",
    "stride 4, of which three taps are no low-pass",
    "a function, not a module",
    "a Conv2dSame has arithmetic of its own",
    "a ScaledStdConv2d has arithmetic of its own",
}

DEAF = ("timm/inception_v4",)  # with random weights nothing of the image reaches its output


@pytest.fixture(autouse=True)
def cheap_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


def build(name: str) -> nn.Module:
    source, model = name.split("/")
    if source == "timm":
        # Behind VGG's maps stand 100 million weights.
        return timm.create_model(model, **({"features_only": True} if "vgg" in model else {"num_classes": 10}))
    if source == "torchvision":
        extra = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(model, weights=None, num_classes=10, **extra)
    return getattr(getattr(torchvision.models, source), model)(weights=None, weights_backbone=None).backbone


def shrinking(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the convolutions and pools that halve a map or more, seen without mixpool."""
    found, handles = set(), []

    def look(name: str):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            if all(isinstance(value, Tensor) and value.ndim == 4 for value in (args[0], out)):
                sides = zip(args[0].shape[-2:], out.shape[-2:], strict=True)
                if all(side > 7 and new <= (side + 1) // 2 for side, new in sides) and out[0, 0].numel() > 1:
                    found.add(name)

        return hook

    for name, module in model.named_modules():
        kind = type(module).__name__
        if ("Conv" in kind or "Pool" in kind) and "Adaptive" not in kind and not list(module.children()):
            handles.append(module.register_forward_hook(look(name)))
    model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST.split() else pytest.mark.slow) for name in TREATED]
)
@torch.no_grad()
def test_treated_or_left_with_a_reason(name: str):
    model = build(name).eval()
    keys = {key: value.shape for key, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    images = [torch.randn(1, 3, *size) for size in PARTICULAR.get(name, SIZES)]
    stock = [tensors_of(model(x)) for x in images]

    flow = trace(model, images[0])
    found = {own.name: own for own in find_decimators(flow)}
    left = [own.why for own in found.values() if own.treatment is None]
    assert len(found) - len(left) == TREATED[name] and set(left) <= REASONS, left
    blurs = {n for n, m in model.named_modules() if "Blur" in type(m).__name__}
    assert shrinking(model, images[0]) <= found.keys() | blurs

    for order in ORDERS:
        plan = plan_of(flow, list(found.values()), order)
        treat(model, plan)
        assert treated_layers(model) == plan and len(plan) >= TREATED[name]
        for x, expected in zip(images, stock, strict=True):
            outputs = tensors_of(model(x))
            assert [out.shape for out in outputs] == [out.shape for out in expected], (order, x.shape)
            assert all(out.isfinite().all() for out in outputs)
            same = all(torch.equal(out, was) for out, was in zip(outputs, expected, strict=True))
            assert same == (not plan) or name in DEAF
        assert {key: value.shape for key, value in model.state_dict().items()} == keys
        untreat(model)
        assert treated_layers(model) == {}
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for x, expected in zip(images, stock, strict=True):
        assert all(torch.equal(out, was) for out, was in zip(tensors_of(model(x)), expected, strict=True))


# Those whose repair goes its own way: concatenations, groups, a linear layer of many inputs, several outputs, FrozenBN.
WHOLE = """torchvision/resnet18 torchvision/squeezenet1_1 torchvision/shufflenet_v2_x0_5 torchvision/alexnet
    torchvision/mobilenet_v2 torchvision/googlenet detection/fasterrcnn_resnet50_fpn timm/dpn68 timm/nf_resnet50"""


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE.split())
def test_stabilize_and_revert(name: str):
    model = build(name).eval()
    side = PARTICULAR.get(name, SIZES)[0][0]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        stock = tensors_of(model(x))
    report = stabilize(model, torch.randn(2, 3, side, side), size=side, depth="all")
    assert len(report.plan) == TREATED[name] and treated_layers(model) == report.plan
    refitted = any(own.what != "left" for own in report.repaired)
    assert refitted or "nf_" in name, "whose convolutions have arithmetic of their own, and no norms"
    assert all(own.after <= own.before + 1e-5 for own in report.repaired if own.what != "left"), str(report)
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        assert [out.shape for out in tensors_of(model(x))] == [out.shape for out in stock]
        revert(model)
        assert all(torch.equal(out, was) for out, was in zip(tensors_of(model(x)), stock, strict=True))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_sweep_is_wide():
    assert len(TREATED) >= 40 and set(FAST.split()) <= TREATED.keys() and PARTICULAR.keys() <= TREATED.keys()
