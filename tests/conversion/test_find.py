"""Finding the stem: by data flow, not by names or order; and what the error says where there is none to convert."""

from __future__ import annotations

import copy
import signal
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mixpool
from mixpool import StemError, convert, revert


class Small(nn.Module):
    """conv -> norm -> act -> pool -> tail, any of which can be replaced; None leaves a part out."""

    def __init__(self, **parts: nn.Module | None) -> None:
        super().__init__()
        self.conv = parts.get("conv", nn.Conv2d(3, 8, 5, 2, 2, bias=False))
        self.norm = parts.get("norm", nn.BatchNorm2d(8))
        self.act = parts.get("act", nn.ReLU())
        self.pool = parts.get("pool", nn.MaxPool2d(3, 2, 1))
        self.tail = nn.Conv2d(8, 6, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.conv, self.norm, self.act, self.pool):
            x = x if part is None else part(x)
        return self.tail(x).mean(dim=(2, 3))


def assert_round_trip(model: nn.Module, names: str, x: Tensor | None = None, **options) -> mixpool.ConversionReport:
    """`convert` finds the stem of these names and with select="none" changes no bit; nor does `revert`."""
    model.eval()
    x = torch.randn(2, 3, 40, 48) if x is None else x
    with torch.no_grad():
        expected = model(x)
        report = convert(model, select="none", **options)
        assert report.stem == names
        assert torch.equal(model(x), expected)
        revert(model)
        assert torch.equal(model(x), expected)
    return report


def test_a_method_of_the_same_name_is_no_call_of_the_module():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.pool = nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.relu(self.conv(x))).mean(dim=1).sub(0.1).relu()

    assert_round_trip(Named(), "conv -> relu -> pool")


def assert_refused(model: object, *words: str, **options) -> str:
    """`convert` raises a StemError with the words in its message and leaves the model as it was."""
    is_module = isinstance(model, nn.Module)
    before = list(model.named_modules()) if is_module else None
    with pytest.raises(StemError) as caught:
        convert(model, **{"select": "all"} | options)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 1200, message
    if is_module:
        assert list(model.named_modules()) == before
    return message


# --- data flow --------------------------------------------------------------------------------------------------------


def test_names_and_order_of_registration_do_not_matter():
    class Scrambled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maxpool = nn.MaxPool2d(2)  # a later one
            self.conv1 = nn.Conv2d(8, 8, 3, padding=1)  # the second convolution
            self.head = nn.Linear(8, 5)
            self.z = nn.MaxPool2d(3, 2)
            self.bn1 = nn.BatchNorm2d(8)
            self.relu = nn.ReLU()
            self.y = nn.BatchNorm2d(8)
            self.last = nn.Conv2d(3, 8, 7, 2)  # the first

        def forward(self, images: Tensor) -> Tensor:
            out = self.z(F.relu(self.y(self.last(images))))
            return self.head(self.maxpool(self.relu(self.bn1(self.conv1(out)))).mean(dim=(2, 3)))

    assert_round_trip(Scrambled(), "last -> y -> z")


RELUS = {"F.relu": F.relu, "torch.relu": torch.relu, "F.relu_": F.relu_, "torch.relu_": torch.relu_, "relu6": F.relu6}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_functional_relu(relu):
    class Functional(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.pool(relu(self.norm(self.conv(x)))))

    report = assert_round_trip(Functional(act=None), "conv -> norm -> pool")
    assert any("relu" in note for note in report.notes)


def test_functional_inplace_relu_by_method():
    class Functional(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.pool(self.norm(self.conv(x)).relu_()))

    assert_round_trip(Functional(act=None), "conv -> norm -> pool")


def test_a_stem_without_activation_and_one_without_norm():
    assert_round_trip(Small(act=None), "conv -> norm -> pool")
    assert_round_trip(Small(norm=None), "conv -> act -> pool")
    assert_round_trip(Small(norm=None, act=None, conv=nn.Conv2d(3, 8, 3)), "conv -> pool")
    assert_round_trip(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), "0 -> 1 -> 2")


def test_identity_and_inactive_dropout_in_between():
    norm = nn.Sequential(nn.Identity(), nn.BatchNorm2d(8), nn.Dropout2d(0.0))
    assert_round_trip(Small(norm=norm), "conv -> norm.1 -> act -> pool")


@pytest.mark.parametrize(
    "act", [nn.LeakyReLU(0.1), nn.ReLU6(inplace=True), nn.ELU(), nn.Hardtanh(), nn.Tanh(), nn.Identity()], ids=repr
)
def test_increasing_activations(act: nn.Module):
    name = "conv -> norm -> pool" if isinstance(act, nn.Identity) else "conv -> norm -> act -> pool"
    model = Small(act=act).eval()
    x = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        expected = model(x)
        assert convert(model, select="none").stem == name
        # Not to the bit: these activations round, and round differently after a pool of another layout.
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        revert(model)
        assert torch.equal(model(x), expected)


def test_padding_valid_is_padding_zero():
    assert_round_trip(Small(conv=nn.Conv2d(3, 8, 5, 2, padding="valid")), "conv -> norm -> act -> pool")


def test_nested_model():
    class Normalise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.mean) / 0.225

    model = nn.Sequential(Normalise(), torchvision.models.resnet18(), nn.Softmax(dim=1))
    keys = list(model.state_dict())
    assert_round_trip(model, "1.conv1 -> 1.bn1 -> 1.relu -> 1.maxpool", torch.randn(1, 3, 64, 64))
    convert(model, select="all")
    assert list(mixpool.stock_state_dict(model)) == keys


def test_one_stem_of_two():
    """The first stem is converted; the other by its name; afterwards both are back."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rgb, self.depth = Small(), Small(conv=nn.Conv2d(1, 8, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.rgb(x) + self.depth(x[:, :1])

    assert_round_trip(Two(), "rgb.conv -> rgb.norm -> rgb.act -> rgb.pool")
    assert_round_trip(Two(), "depth.conv -> depth.norm -> depth.act -> depth.pool", stem="depth.conv")


def test_googlenet_transforms_its_input_before_the_stem():
    model = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True)
    assert_round_trip(model, "conv1.conv -> conv1.bn -> maxpool1", torch.randn(1, 3, 64, 64))


def test_shape_checks_before_the_stem():
    """Models check their input's shape (transformers' ResNet does); that must not stand in the way."""

    class Checked(Small):
        def forward(self, x: Tensor) -> Tensor:
            if x.ndim != 4 or x.shape[1] != 3:
                raise ValueError("expected RGB images")
            assert x.shape[-1] >= 8
            batch, _, height, width = x.shape
            return super().forward(x).view(batch, -1) / (height * width)

    assert_round_trip(Checked(), "conv -> norm -> act -> pool")


def test_loops_over_the_size_after_the_stem():
    """Answering a shape comparison the same way for ever would never end."""

    class Pyramid(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.act(self.norm(self.conv(x))))
            while x.shape[-1] >= 4:
                x = F.avg_pool2d(x, 2)
            while not x.shape[-1] <= 2:
                x = x[..., :-1]
            return x.mean(dim=(2, 3))

    class Timeout(BaseException):
        pass

    def give_up(*args):
        raise Timeout("convert did not end")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    try:
        assert_round_trip(Pyramid(), "conv -> norm -> act -> pool")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_branches_on_values_before_the_stem_are_not_guessed():
    """Which way an image goes is not known from its shape: the user must name the stem."""

    class Branches(Small):
        def __init__(self) -> None:
            super().__init__()
            self.night = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.mean() < 0:
                x = self.night(x)
            return super().forward(x)

    assert_refused(Branches(), "cannot be traced")


def test_optional_arguments_of_forward():
    class WithLoss(Small):
        def forward(self, x: Tensor, labels: Tensor | None = None, *, scale: float = 1.0, **kwargs) -> Tensor:
            logits = super().forward(x) * scale
            return logits if labels is None else F.cross_entropy(logits, labels)

    assert_round_trip(WithLoss(), "conv -> norm -> act -> pool")


# --- models that cannot be traced -------------------------------------------------------------------------------------


class EarlyExit(nn.Module):
    """Python control flow that depends on the data, after the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Small()
        self.more = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stem(x)
        while float(out.abs().max()) > 1:
            out = self.more(out / 2)
        return out


class Detector(nn.Module):
    """Python control flow that depends on the data, before the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Small()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.max()) > 100:
            x = x / 255
        return self.body(x)


def test_untraceable_after_the_stem():
    report = assert_round_trip(EarlyExit(), "stem.conv -> stem.norm -> stem.act -> stem.pool")
    assert any("traced only as far as the stem" in note for note in report.notes)


def test_untraceable_before_the_stem():
    assert_refused(Detector(), "cannot be traced", 'stem="')
    assert_round_trip(
        Detector(), "body.conv -> body.norm -> body.act -> body.pool", torch.randn(1, 3, 32, 32), stem="body.conv"
    )


def test_detector_of_torchvision():
    """An untraceable model with a frozen norm layer, whose parts are called through an IntermediateLayerGetter."""
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96
    ).eval()
    model.backbone.body.bn1 = torchvision.ops.FrozenBatchNorm2d(64)
    norm = model.backbone.body.bn1
    assert isinstance(norm, torchvision.ops.FrozenBatchNorm2d)
    norm.weight.normal_()
    norm.running_mean.normal_()
    keys = list(model.state_dict())
    images = [torch.rand(3, 64, 80)]
    with torch.no_grad():
        expected = model.backbone(torch.stack(images))
        report = convert(model, select="none", stem="backbone.body.conv1")
        assert report.stem.split(" -> ")[0] == "backbone.body.conv1"
        out = model.backbone(torch.stack(images))
        for key, value in expected.items():
            torch.testing.assert_close(out[key], value, rtol=0, atol=1e-5 * value.abs().max().item())
        revert(model)
        out = model.backbone(torch.stack(images))
        assert all(torch.equal(out[key], value) for key, value in expected.items())
        convert(model, select="all", stem="backbone.body.conv1")
        assert all(detection["boxes"].isfinite().all() for detection in model(images))
    assert list(mixpool.stock_state_dict(model)) == keys


# --- stem= ------------------------------------------------------------------------------------------------------------


def test_wrong_names_are_answered_with_the_right_ones():
    model = torchvision.models.resnet18()
    assert_refused(model, "'conv_1'", "no module of that name", "conv1, layer1.0.conv1", stem="conv_1")
    assert_refused(model, "'bn1'", "BatchNorm2d", "conv1", stem="bn1")
    assert_refused(model, "''", "convolution", stem="")
    assert_refused(model, "layer1.0.conv1", "layer1.0.conv2", stem="layer1.0.conv1")


def test_a_named_convolution_that_forward_does_not_call():
    model = Small()
    model.spare = nn.Conv2d(3, 8, 3)
    assert_refused(model, "does not", "spare", stem="spare")


@pytest.mark.slow
def test_deep_stems_name_the_convolution_before_the_pool():
    model = timm.create_model("resnet50d")
    assert_refused(model, "another convolution", 'stem="conv1.6"', "conv1.0 [Conv2d] -> conv1.1")
    report = assert_round_trip(model, "conv1.6 -> bn1 -> act1 -> maxpool", torch.randn(1, 3, 64, 64), stem="conv1.6")
    assert any("not the first convolution" in note for note in report.notes)
    # Its input is features, to which the rule for images does not apply; an explicit choice is the user's.
    assert convert(model, select="auto", stem="conv1.6").num_complex == 0
    revert(model)
    assert convert(model, select="all", stem="conv1.6").num_complex == 64


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "resnetaa50", "regnetx_002", "efficientnet_b0", "vit_tiny_patch16_224", "resnetrs50"]
)
def test_models_without_a_max_pool(name: str):
    assert_refused(timm.create_model(name).to("meta"), "max pool")


def test_models_without_a_convolution():
    assert_refused(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "Conv2d")
    assert_refused(nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.MaxPool1d(2)), "Conv2d")
    assert_refused(nn.Conv2d(3, 8, 3), "Conv2d")
    assert_refused("resnet18", "torch.nn.Module", "str")

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(F.relu(F.conv2d(x, self.weight)))

    assert_refused(Functional(), "functional calls of conv2d")


def test_functional_max_pool():
    class Functional(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.tail(F.max_pool2d(self.act(self.norm(self.conv(x))), 3, 2, 1))

    assert_refused(Functional(), "functional call", "max_pool2d")


def test_branches_off_the_stem():
    class Skip(Small):
        """A U-Net keeps the stem's map at full resolution for its decoder."""

        def forward(self, x: Tensor) -> Tensor:
            full = self.act(self.norm(self.conv(x)))
            deep = self.tail(self.pool(full))
            return F.interpolate(deep, full.shape[-2:]) + full[:, :6]

    assert_refused(Skip(), "branching off", "act")

    class Residual(Small):
        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            return self.tail(self.pool(self.act(self.norm(out)) + out))

    assert_refused(Residual(), "branching off", "conv")

    class Returned(Small):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            full = self.act(self.norm(self.conv(x)))
            return full, self.tail(self.pool(full))

    assert_refused(Returned(), "act", "output")


def test_modules_called_twice():
    class Siamese(Small):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) - super().forward(y)

    assert_refused(Siamese(), "called once", "conv")

    class SharedPool(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.act(self.norm(self.conv(x))))
            return self.pool(self.tail(x))

    assert_refused(SharedPool(), "called once", "pool")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"norm": nn.GroupNorm(2, 8)}, ["GroupNorm"]),
        ({"norm": nn.InstanceNorm2d(8)}, ["InstanceNorm2d"]),
        ({"norm": nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))}, ["norm.1"]),
        ({"norm": nn.Dropout2d(0.1)}, ["Dropout2d"]),
        ({"act": nn.SiLU()}, ["SiLU", "increasing"]),
        ({"act": nn.GELU()}, ["GELU", "increasing"]),
        ({"act": nn.PReLU()}, ["PReLU", "increasing"]),
        ({"act": nn.LeakyReLU(-0.1)}, ["LeakyReLU", "increasing"]),
        ({"act": nn.Softmax(dim=1)}, ["Softmax"]),
        ({"conv": timm.layers.StdConv2d(3, 8, 5, 2, 2)}, ["StdConv2d", "nn.Conv2d"]),
        ({"conv": parametrizations.weight_norm(nn.Conv2d(3, 8, 5, 2))}, ["Conv2d"]),
        ({"conv": parametrizations.spectral_norm(nn.Conv2d(3, 8, 5, 2))}, ["Conv2d"]),
        ({"conv": torch.nn.utils.spectral_norm(nn.Conv2d(3, 8, 5, 2))}, ["permanent"]),
        ({"conv": nn.Conv2d(3, 8, 5, padding="same")}, ["same"]),
        ({"conv": nn.Conv2d(3, 8, 5, 2, 2, padding_mode="reflect")}, ["reflect"]),
        ({"conv": nn.Conv2d(3, 9, 5, 2, groups=3), "norm": None}, ["groups=3"]),
        ({"pool": nn.MaxPool2d(5, 2)}, ["window of 2 or 3", "5"]),
        ({"pool": nn.MaxPool2d(3, 2, dilation=2)}, ["dilation"]),
        ({"pool": nn.AdaptiveMaxPool2d(4)}, ["max pool"]),
        ({"pool": nn.AvgPool2d(3, 2)}, ["max pool"]),
        ({"pool": nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2))}, ["pool.0"]),
    ],
    ids=lambda value: (
        next(iter(value)) + "-" + type(next(iter(value.values()))).__name__ if isinstance(value, dict) else ""
    ),
)
def test_parts_that_cannot_be_taken_over(part: dict, words: list[str]):
    """Refused with a ValueError that names the part; the model is as it was."""
    model = Small(**part)
    before, state = list(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        convert(model, select="all")
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert list(model.named_modules()) == before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_pruned_convolution_is_refused_until_made_permanent():
    model = Small()
    prune.random_unstructured(model.conv, "weight", 0.3)
    with pytest.raises(ValueError, match="permanent"):
        convert(model, select="all")
    prune.remove(model.conv, "weight")
    assert_round_trip(model, "conv -> norm -> act -> pool")


# --- converted, compiled and wrapped models ---------------------------------------------------------------------------


def test_converted_already():
    model = Small()
    convert(model, select="all")
    assert_refused(model, "converted already", "'conv'", "revert")
    revert(model)
    convert(model, select="none")
    assert_refused(nn.Sequential(model), "converted already", "'0.conv'")


def test_compiled():
    assert_refused(torch.compile(Small()), "OptimizedModule", "convert first")
    model = Small()
    model.compile()
    with pytest.raises(StemError, match="compile"):
        convert(model)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_for_data_parallel_training(process_group):
    model = nn.parallel.DistributedDataParallel(Small())
    assert_refused(model, "DistributedDataParallel", "convert first")
    assert_refused(nn.DataParallel(Small()), "DataParallel", "convert first")
    converted = Small()
    convert(converted, select="all")
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        revert(nn.parallel.DistributedDataParallel(converted))


def test_script_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, in several wordings
        scripted = torch.jit.trace(Small().eval(), torch.randn(1, 3, 32, 32))
    assert_refused(scripted, "ScriptModule")


def test_fx_graph_modules_convert_like_others():
    model = Small().eval()
    assert_round_trip(torch.fx.symbolic_trace(model), "conv -> norm -> act -> pool")
