"""Wavelet packets as first layers: which packets, how well few taps hold them, the stem, and what training may change.

Truth is the uncut packets themselves (`dtcwpt_filters`, tested in test_dtcwpt.py), spectra by torch.fft, and the stock
stem.
"""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support import assert_close, assert_same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mixpool
from mixpool import MixPoolStem, StemError, analytic_partner, analyze
from mixpool.conversion.initialize import initialize, wavelet_stem
from mixpool.filters.gabor import COLOR_SHARE, gabor_bank
from mixpool.filters.packets import dtcwpt_filters
from mixpool.filters.partner import wrong_side_energy
from mixpool.filters.spectrum import frequency_grid, half_plane_side, natural_image_prior, orientation
from mixpool.filters.wavelets import half_plane_share, packet_kernels, wavelet_bank

GRID = 255


def rows_of(packet: Tensor, depth: int) -> list[int]:
    """Rows of packets (n, 3) among all packets of the depth."""
    return [2 * (iy * 2**depth + ix) + (sign < 0) for iy, ix, sign in packet.tolist()]


def spectrum(kernels: Tensor) -> Tensor:
    return torch.fft.fft2(kernels, s=(GRID, GRID))


def centroid(kernels: Tensor, direction: Tensor, seen: Tensor | float = 1.0) -> Tensor:
    """(n, 2) centroid of the energy, times `seen`, over the half planes of the directions."""
    grid = frequency_grid(GRID)
    energy = spectrum(kernels).abs().square() * seen * (1 + half_plane_side(grid, direction)) / 2
    return torch.einsum("cyx,yxd->cd", energy, grid) / energy.sum(dim=(1, 2))[:, None]


def parts(channels: int = 64, taps: int = 7, stride: int = 2, norm: bool = True, bias: bool = False) -> tuple:
    conv = nn.Conv2d(3, channels, taps, stride, taps // 2, bias=bias)
    return conv, nn.BatchNorm2d(channels) if norm else None, nn.ReLU(), nn.MaxPool2d(3, 2, 1)


def pink_images(count: int = 2, size: int = 96) -> Tensor:
    """Gray 1 / f noise, (count, 3, size, size), of variance 1."""
    grid = frequency_grid(size, dtype=torch.float32)
    noise = torch.fft.fft2(torch.randn(count, 1, size, size)) * natural_image_prior(grid).sqrt()
    noise[..., 0, 0] = 0
    x = torch.fft.ifft2(noise).real
    return (x / x.std()).expand(-1, 3, -1, -1).contiguous()


# --- which packets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, count", [(2, 16), (3, 96)])
def test_kept_are_the_packets_that_border_neither_on_pi_nor_twice_on_zero(depth, count):
    """At depth 2 these are the 16 that paper 2's ResNet keeps (hubert-leterme/wcnn, its 14 edges excluded)."""
    last = 2**depth - 1
    expected = {(iy, ix, sign) for iy in range(last) for ix in range(last) for sign in (1, -1) if iy > 0 or ix > 0}
    packets = packet_kernels(7, depth)
    assert {tuple(packet) for packet in packets.packet.tolist()} == expected
    assert len(packets) == count


@pytest.mark.parametrize("wavelet", ["qshift_06", "qshift_a", "qshift_d"])
@pytest.mark.parametrize("depth", [2, 3])
def test_the_limit_on_the_half_plane_share_lies_in_a_gap(depth, wavelet):
    share = half_plane_share(dtcwpt_filters(depth, wavelet))
    kept = share >= 0.95
    assert share[kept].min() > 0.992 and share[~kept].max() < 0.925
    assert kept.sum() == {2: 16, 3: 96}[depth]


def test_half_plane_share_is_that_of_the_two_dimensional_spectrum():
    filters = dtcwpt_filters(2)
    power = torch.fft.fft2(filters.kernels, s=(65, 65)).abs().square()
    side = half_plane_side(frequency_grid(65), filters.center_frequency)
    expected = (power * (1 + side) / 2).sum(dim=(1, 2)) / power.sum(dim=(1, 2))
    assert_close("share", half_plane_share(filters), expected, (0.01, 0))  # because the grids differ


# --- the packets on few taps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps, depth", [(7, 2), (8, 2), (11, 3)])
def test_a_kernel_is_the_best_of_sum_zero_on_the_window_with_the_most_energy(taps, depth):
    packets, filters = packet_kernels(taps, depth), dtcwpt_filters(depth)
    prior = natural_image_prior(frequency_grid(GRID))
    rows = rows_of(packets.packet, depth)
    for i in range(0, len(packets), 5):
        packet, kernel = filters.kernels[rows[i]], packets.kernels[i]
        energy = packet.abs().square().unfold(0, taps, 1).unfold(1, taps, 1).sum(dim=(2, 3))
        assert packets.kept_energy[i].item() == pytest.approx((energy.max() / packet.abs().square().sum()).item())
        top, left = divmod(int(energy.argmax()), energy.shape[1])

        placed = torch.zeros_like(packet.real)
        placed[top : top + taps, left : left + taps] = kernel
        mine, whole = spectrum(placed), spectrum(packet.real)

        def inner(a: Tensor, b: Tensor) -> float:
            return (prior * a.conj() * b).sum().real.item()

        factor = inner(mine, whole) / inner(mine, mine)
        variation = torch.zeros_like(placed)
        variation[top : top + taps, left : left + taps] = torch.randn(taps, taps, dtype=torch.float64)
        variation[top : top + taps, left : left + taps] -= variation.sum() / taps**2
        slope = inner(spectrum(variation), factor * mine - whole)
        scale = math.sqrt(inner(spectrum(variation), spectrum(variation)) * inner(whole, whole))
        assert abs(slope) < 1e-8 * scale, packets.packet[i]
        correlation = inner(mine, whole) / math.sqrt(inner(mine, mine) * inner(whole, whole))
        assert packets.image_correlation[i].item() == pytest.approx(correlation, abs=1e-8)


# The table of `packet_kernels`: depth, taps, kept energy, image correlation, error, error in images.
TABLE = [
    (2, 7, 0.93, 0.95, 0.17, 0.09),
    (2, 9, 0.97, 0.97, 0.05, 0.03),
    (3, 11, 0.80, 0.89, 0.40, 0.07),
    (3, 15, 0.94, 0.96, 0.16, 0.03),
    (3, 17, 0.96, 0.97, 0.06, 0.02),
]


@pytest.mark.parametrize("depth, taps, kept, correlation, error, error_in_images", TABLE)
def test_what_few_taps_cost_is_what_the_docstring_says(depth, taps, kept, correlation, error, error_in_images):
    packets = packet_kernels(taps, depth)
    few = slice(0, 32)
    kernels, direction = packets.kernels[few], packets.center_frequency[few]
    whole = dtcwpt_filters(depth).kernels.real[rows_of(packets.packet[few], depth)]
    assert packets.kept_energy[few].min().item() == pytest.approx(kept, abs=0.005)
    assert packets.image_correlation[few].min().item() == pytest.approx(correlation, abs=0.005)
    for seen, limit in ((1.0, error), (natural_image_prior(frequency_grid(GRID)), error_in_images)):
        distance = (centroid(kernels, direction, seen) - centroid(whole, direction, seen)).norm(dim=1)
        assert distance.max().item() == pytest.approx(limit, abs=0.006)
    assert kernels.sum(dim=(1, 2)).abs().max() < 1e-12
    assert_close("norm", kernels.flatten(1).norm(dim=1), torch.ones(len(kernels)))
    partner = analytic_partner(kernels[:, None], direction)
    assert wrong_side_energy(kernels[:, None], partner, direction).max() < 0.02  # nearly one-sided


def test_a_docstring_quotes_the_table():
    for depth, taps, kept, correlation, error, error_in_images in TABLE:
        row = f"{depth:13d}{taps:6d}         {kept:.2f}        {correlation:.2f} "
        assert row in packet_kernels.__wrapped__.__doc__, row
        assert f"{error:.2f} (" in packet_kernels.__wrapped__.__doc__
        assert f"{error_in_images:.2f} (" in packet_kernels.__wrapped__.__doc__


# --- banks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, in_channels, taps, depth", [(24, 3, 7, 2), (32, 3, 11, 3), (36, 3, 9, 2), (16, 1, 7, 2), (33, 4, 6, 2)]
)
def test_bank_shape_norm_mean_and_determinism(count, in_channels, taps, depth):
    bank = wavelet_bank(count, in_channels, taps, depth)
    assert bank.shape == (count, in_channels, taps, taps) and bank.dtype == torch.float32
    assert_close("norm", bank.flatten(1).norm(dim=1), torch.ones(count))
    assert bank.sum(dim=(2, 3)).abs().max() < 1e-5
    torch.manual_seed(1)
    assert_same_bits("again", bank, wavelet_bank(count, in_channels, taps, depth))


@pytest.mark.parametrize("count, in_channels, depth", [(24, 3, 2), (80, 3, 2), (32, 3, 3), (80, 4, 2)])
def test_no_filter_is_there_twice(count, in_channels, depth):
    bank = wavelet_bank(count, in_channels, 7, depth).flatten(1)
    similarity = (bank @ bank.T).abs() - torch.eye(count)
    assert similarity.max() < 0.98


def test_twenty_four_filters_have_the_multiplicities_of_paper_2():
    """wcnn's ResNet: two outputs for the packets of the lowest octave and for (2, 2), one for the others."""
    packets, bank = packet_kernels(7, 2), wavelet_bank(24)
    similarity = (bank.sum(dim=1).flatten(1), packets.kernels.float().flatten(1))
    is_gray = (bank - bank.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert is_gray.tolist() == [True] * 16 + [False] * 8
    assert_close("gray", similarity[0][:16] / math.sqrt(3), similarity[1])
    patterns = bank[16:].flatten(2)[:, 2]  # no opponent colour used here is without blue or green alone
    patterns = torch.where(patterns.norm(dim=1, keepdim=True) > 0.1, patterns, bank[16:].flatten(2)[:, 0])
    again = (F.normalize(patterns, dim=1) @ similarity[1].T).abs().argmax(dim=1)
    doubled = {tuple(packets.packet[i].abs().tolist()[:2]) for i in again.tolist()}
    assert len(set(again.tolist())) == 8 and doubled == {(0, 1), (1, 0), (1, 1), (2, 2)}


def test_thirty_two_filters_are_the_lowest_packets_in_all_orientations():
    packets, bank = packet_kernels(11, 3), wavelet_bank(32, 3, 11, 3)
    assert_close("bank", bank[:, 0] * math.sqrt(3), packets.kernels[:32].float())
    chosen = {tuple(packet) for packet in packets.packet[:32].tolist()}
    assert chosen == {(ix, iy, sign) for iy, ix, sign in chosen} == {(iy, ix, -sign) for iy, ix, sign in chosen}
    frequency = packets.center_frequency.norm(dim=1)
    assert frequency[:32].max() < frequency[32:].min()


def test_whole_orbits_come_first():
    packets = packet_kernels(7, 2)
    for count, expected in [(6, {0, 1}), (8, {0, 1, 4}), (7, {0, 1, 2})]:
        bank = wavelet_bank(count, 1)
        rows = (bank[:, 0].flatten(1) @ packets.kernels.float().flatten(1).T).argmax(dim=1)
        assert set(packets.orbit[rows].tolist()) == expected


@pytest.mark.parametrize("taps, depth", [(9, 2), (17, 3)])
def test_the_filters_have_their_packets_frequency_and_orientation(taps, depth):
    packets = packet_kernels(taps, depth)
    stats = analyze(wavelet_bank(16, 1, taps, depth), stride=2 ** (depth - 1))
    whole = dtcwpt_filters(depth).kernels.real[rows_of(packets.packet[:16], depth)]
    expected = analyze(whole[:, None])
    turn = stats.orientation - expected.orientation
    turn = (turn + math.pi / 2).remainder(math.pi) - math.pi / 2
    assert turn.abs().max() < math.radians(2)
    assert (stats.frequency - expected.frequency).abs().max() < 0.07
    assert stats.dc_share.max() < 1e-10
    assert orientation(packets.center_frequency[:16]).unique().numel() >= 8


def test_color_mix_is_taken_as_given():
    mix = torch.rand(20, 3) + 0.1
    bank = wavelet_bank(20, color_mix=mix)
    patterns = bank / F.normalize(mix, dim=1)[:, :, None, None]
    assert_close("one kernel", patterns, patterns[:, :1].expand(-1, 3, -1, -1), (1e-6, 1e-4))


# --- the stem ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, taps, stride, expected", [(64, 7, 2, 48), (64, 11, 4, 32), (96, 7, 2, 72)])
def test_default_numbers_depths_scale_and_free_channels(channels, taps, stride, expected):
    conv, *others = parts(channels, taps, stride)
    before = conv.weight.detach().clone()
    stem = wavelet_stem(conv, *others)
    assert stem.num_modulus == expected and stem.kinds == ("max",) * (channels - expected) + ("modulus",) * expected
    assert stem.weight is conv.weight
    assert_same_bits("free channels", stem.weight[:-expected], before[:-expected])
    norms = stem.weight.detach()[-expected:].flatten(1).norm(dim=1)
    rms = before.flatten(1).norm(dim=1).square().mean().sqrt()
    assert_close("norms", norms, rms.expand(expected), (1e-6, 1e-5))
    bank = wavelet_bank(expected, 3, taps, {2: 2, 4: 3}[stride])
    assert_close("filters", stem.weight[-expected:] / rms, bank)


@pytest.mark.parametrize("taps, stride", [(7, 2), (11, 4)])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_modulus_moves_a_third_as_much_as_the_maximum(taps, stride, trainable):
    """On 1 / f noise, shifted by 1 pixel: |U(x shifted) - U(x)| / |U(x)| of the gray packets."""
    conv = nn.Conv2d(3, 64, taps, stride, taps // 2, bias=False)
    stem = wavelet_stem(conv, trainable=trainable)
    control = MixPoolStem(conv, select="none")
    x = pink_images(2, 129)
    gray = slice(-stem.num_modulus, 16 - stem.num_modulus)
    for dy, dx in ((1, 0), (0, 1)):
        changes = []
        for module in (stem, control):
            with torch.no_grad():
                here, there = (
                    module(images)[:, gray] for images in (x[..., :128, :128], x[..., dy : 128 + dy, dx : 128 + dx])
                )
            here, there = here[..., 2:-2, 2:-2], there[..., 2:-2, 2:-2]
            changes.append(((there - here).square().mean(dim=(0, 2, 3)) / here.square().mean(dim=(0, 2, 3))).sqrt())
        assert changes[0].max() < 0.16
        assert changes[0].mean() < 0.4 * changes[1].mean() and (changes[0] < 0.7 * changes[1]).all()


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("taps, stride, more", [(7, 2, 11), (11, 4, 17), (6, 2, 8)])
def test_more_taps_keep_the_size_and_the_free_channels(taps, stride, more, trainable):
    conv, norm, act, pool = parts(64, taps, stride)
    control = MixPoolStem(copy.deepcopy(conv), copy.deepcopy(norm), act, pool, select="none", max_blur=3).eval()
    stem = wavelet_stem(conv, norm, act, pool, kernel_size=more, trainable=trainable).eval()
    assert stem.kernel_size == (more, more) == conv.kernel_size and conv.weight.shape[-1] == more
    free = 64 - stem.num_modulus
    for size in ((65, 60), (64, 71)):
        x = torch.randn(1, 3, *size)
        out, expected = stem(x), control(x)
        assert out.shape == expected.shape
        assert_close("free channels", out[:, :free], expected[:, :free])


def test_depth_and_number_can_be_given():
    conv, *others = parts(20, 9, 3)
    stem = wavelet_stem(conv, *others, num_wavelet=20, depth=3, wavelet="qshift_06")
    assert stem.num_modulus == 20
    assert_close(
        "filters",
        F.normalize(stem.weight.flatten(1), dim=1),
        F.normalize(wavelet_bank(20, 3, 9, 3, wavelet="qshift_06").flatten(1), dim=1),
    )


# --- training ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
}


def train(model: nn.Module, optimizer: str = "adamw", steps: int = 3, shape: tuple = (2, 3, 48, 48)) -> None:
    model.train()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    x, upstream = torch.randn(shape), None
    for _ in range(steps):
        out = model(x)
        upstream = torch.randn_like(out) if upstream is None else upstream
        optimizer.zero_grad()
        (out * upstream).mean().mul(100).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"norm": False, "bias": True}], ids=["norm", "bias"])
def test_fixed_packets_stay_whatever_the_optimizer_and_everything_else_moves(optimizer, options):
    stem = wavelet_stem(*parts(**options), trainable=False)
    before = stem.weight.detach().clone()
    mix = stem.parametrizations.weight.original1.detach().clone()
    kernels = packet_kernels(7, 2).kernels.float().flatten(1)
    train(stem, optimizer)
    after = stem.weight.detach()
    free = (after - before)[:16].abs().amax(dim=(1, 2, 3))
    assert (free > 1e-4).all()
    chosen = []
    for weight in (before, after):
        _, size, right = torch.linalg.svd(weight[16:].double().flatten(2))
        assert (size[:, 1] < 1e-6 * size[:, 0]).all()  # still a colour times one kernel
        similarity = (right[:, 0] @ kernels.T.double()).abs()
        assert (similarity.amax(dim=1) > 1 - 1e-6).all()  # which is a packet
        chosen.append(similarity.argmax(dim=1))
    assert torch.equal(*chosen)  # the same packet
    change = stem.parametrizations.weight.original1.detach() - mix
    assert (change.norm(dim=1) > 1e-4).all()  # in another amount of each colour
    assert stem.weight.shape == before.shape and dict(stem.named_parameters()).keys() >= {
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }


def test_trainable_packets_move_all():
    stem = wavelet_stem(*parts())
    before = stem.weight.detach().clone()
    train(stem)
    assert ((stem.weight - before).abs().amax(dim=(1, 2, 3)) > 1e-4).all()
    size = torch.linalg.svdvals(stem.weight.detach()[16:].flatten(2))
    assert (size[:, 1] > 1e-3 * size[:, 0]).all()


@pytest.mark.parametrize("imag", ["tied", "free"])
def test_trainable_stem_is_the_mixpool_stem_of_its_weights(imag):
    conv, *others = parts()
    stem = wavelet_stem(conv, *others, imag=imag, blur=1)
    plain = copy.deepcopy(conv), *copy.deepcopy(others)
    same = MixPoolStem(*plain, select=[False] * 16 + [True] * 48, imag=imag, blur=1, max_blur=3)
    x = torch.randn(2, 3, 40, 40)
    assert_same_bits("out", stem(x), same(x))
    assert stem.state_dict().keys() == same.state_dict().keys()


def test_gradient_of_the_colour_mix_is_the_chain_rule():
    conv, *others = parts()
    fixed = wavelet_stem(copy.deepcopy(conv), *copy.deepcopy(others), trainable=False)
    free = wavelet_stem(conv, *others)
    x = torch.randn(2, 3, 40, 40)
    out, expected = fixed(x), free(x)
    assert_close("out", out, expected)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    originals = fixed.parametrizations.weight
    tolerance = (1e-3, 1e-3)  # because of sums over many positions in float32
    assert_close("free channels", originals.original0.grad, free.weight.grad[:16], tolerance)
    kernels = originals[0].kernels
    expected = torch.einsum("ciyx,cyx->ci", free.weight.grad[16:], kernels)
    assert_close("colour mix", originals.original1.grad, expected, tolerance)
    assert originals.original1.shape == (48, 3)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
def test_state_dict_round_trip_copy_and_dtypes(trainable):
    stem = wavelet_stem(*parts(), trainable=trainable)
    train(stem)
    other = wavelet_stem(*parts(), trainable=trainable)
    stem.eval(), other.eval()
    x = torch.randn(2, 3, 40, 40)
    expected = stem(x)
    assert (other(x) - expected).abs().max() > 1e-2
    assert other.load_state_dict(stem.state_dict()) == ([], [])
    assert_same_bits("loaded", other(x), expected)
    twin = copy.deepcopy(stem)
    assert_same_bits("copied", twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert_same_bits("the copy has its own parameters", stem(x), expected)
    assert_close("float64", copy.deepcopy(stem).double()(x.double()).float(), expected)
    assert_close("channels_last", stem.to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.parametrize("trainable", [True, False])
def test_compiled_stem_is_the_stem(trainable, monkeypatch):
    monkeypatch.undo()  # dynamo cannot trace the wrappers of conftest.py
    torch.compiler.reset()
    stem = wavelet_stem(*parts(8), trainable=trainable).eval()
    x = torch.randn(2, 3, 40, 40)
    compiled = torch.compile(stem, backend="aot_eager", fullgraph=True)
    assert_close("out", compiled(x), stem(x))


def test_data_parallel_training_of_a_fixed_stem(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stem = wavelet_stem(*parts(16), trainable=False)
        model = nn.parallel.DistributedDataParallel(stem)
        out = model(torch.randn(2, 3, 32, 32))
        out.backward(torch.randn_like(out))
        assert all(parameter.grad is not None for parameter in stem.parameters())
    finally:
        torch.distributed.destroy_process_group()


# --- models -----------------------------------------------------------------------------------------------------------

MODELS = {
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=5), "conv1", 48, 64),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=5), "conv1", 48, 64),
    "torchvision alexnet": (lambda: torchvision.models.alexnet(num_classes=5), "features.0", 32, 67),
}


@pytest.mark.parametrize("make, name, count, size", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("bank, trainable", [("wavelet", True), ("wavelet", False), ("gabor", True)])
def test_models_train_and_revert(make, name, count, size, bank, trainable):
    model = make()
    model.eval()
    x = torch.randn(2, 3, size, size)
    shape = model(x).shape
    report = initialize(model, bank, trainable=trainable)
    assert report.num_modulus == count and str(report)
    stem = model.get_submodule(name)
    assert isinstance(stem, MixPoolStem) and model(x).shape == shape
    before = stem.weight.detach().clone()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, "sgd", steps=1, shape=(2, 3, size, size))
    assert ((stem.weight - before).abs().amax(dim=(1, 2, 3)) > 0).all()
    model.load_state_dict(state)
    assert_same_bits("restored", stem.weight, before)
    if not trainable:
        parametrize.remove_parametrizations(stem, "weight")
    mixpool.revert(model)
    conv = model.get_submodule(name)
    assert type(conv) is nn.Conv2d and isinstance(conv.weight, nn.Parameter)
    assert_same_bits("reverted", conv.weight, before)
    assert model.eval()(x).shape == shape


def test_a_model_without_modulus_is_the_real_twin():
    model, control = timm.create_model("resnet18"), timm.create_model("resnet18")
    report = initialize(model, pooling="max", trainable=False)
    assert report.num_modulus == 0
    control.load_state_dict(model.state_dict() | {}, strict=False)
    stem = model.conv1
    stock = nn.Sequential(copy.deepcopy(control.conv1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).eval()
    with torch.no_grad():
        stock[0].weight.copy_(stem.weight)
    x = torch.randn(1, 3, 64, 64)
    assert_close("out", stem.eval()(x), stock(x))
    assert torch.linalg.matrix_rank(stem.weight.detach()[-48:].flatten(2), rtol=1e-5).max() == 1


def test_gabor_filters_for_the_modulus_are_fast_and_of_one_phase_each():
    model = timm.create_model("resnet18")
    report = initialize(model, "gabor")
    assert report.stats.frequency[-48:].min() > 1.0 and report.num_modulus == 48
    weight = model.conv1.weight.detach()[-48:]
    partner = model.conv1.imaginary_weight().detach()
    similarity = torch.einsum(
        "ck,dk->cd", torch.complex(weight, partner).flatten(1), torch.complex(weight, -partner).flatten(1)
    ).abs()
    norm = similarity.diagonal().sqrt()
    assert (similarity / norm[:, None] / norm - torch.eye(48)).max() < 0.98  # as complex filters, whatever the phase
    is_gray = (weight - weight.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert is_gray.sum() == 48 - round(48 * COLOR_SHARE)


def test_own_filters_and_the_same_parameter():
    model = timm.create_model("resnet18")
    weight, before = model.conv1.weight, model.conv1.weight.detach().clone()
    mix = torch.tensor([[0.98, 1.31, 0.71]]).expand(10, 3)
    report = initialize(model, wavelet_bank(10, color_mix=mix), trainable=True)
    assert report.num_modulus == 10 and model.conv1.weight is weight
    assert_same_bits("free", weight[:-10], before[:-10])
    model = timm.create_model("resnet18")
    initialize(model, gabor_bank(64, kernel_size=9))
    assert model.conv1.num_modulus == 64 and model.conv1.padding == (4, 4)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_channels": 0}, "num_channels=0"),
        ({"num_channels": 8, "in_channels": 0}, "in_channels=0"),
        ({"num_channels": 81}, "at most 80 channels .* got 81"),
        ({"num_channels": 17, "in_channels": 1}, "at most 16 channels"),
        ({"num_channels": 8, "depth": 1}, "depth of 2 or 3, got depth=1"),
        ({"num_channels": 8, "kernel_size": 2}, "kernel_size=2"),
        ({"num_channels": 8, "kernel_size": 31}, "from 3 to 29"),
        ({"num_channels": 8, "wavelet": "haar"}, "haar"),
        ({"num_channels": 8, "color_mix": torch.ones(7, 3)}, r"\(8, 3\)"),
        ({"num_channels": 8, "color_mix": torch.zeros(8, 3)}, "zero rows"),
    ],
)
def test_bank_errors_name_the_number(arguments, message):
    with pytest.raises(ValueError, match=message):
        wavelet_bank(**arguments)


@pytest.mark.parametrize(
    "conv, options, message",
    [
        ({}, {"trainable": False, "imag": "free"}, "imag='free'"),
        ({"stride": 3}, {}, "stride 3"),
        ({"stride": 3}, {"num_wavelet": 4}, "stride=3"),
        ({"stride": (2, 1)}, {}, r"\(2, 1\)"),
        ({"kernel_size": (7, 5)}, {}, r"\(7, 5\)"),
        ({}, {"kernel_size": 8}, "7, 9, 11, ..., got 8"),
        ({}, {"kernel_size": 5}, "got 5"),
        ({}, {"num_wavelet": 65}, r"1 to 64 filters"),
        ({}, {"blur": 2}, "blur"),
        ({"padding": "same", "stride": 1}, {}, "same"),
    ],
)
def test_stem_errors_leave_the_convolution_as_it_was(conv, options, message):
    conv = nn.Conv2d(3, 64, **{"kernel_size": 7, "stride": 2, "padding": 3} | conv)
    weight, before = conv.weight, conv.weight.detach().clone()
    geometry = conv.kernel_size, conv.padding
    with pytest.raises(ValueError, match=message):
        wavelet_stem(conv, **options)
    assert conv.weight is weight and (conv.kernel_size, conv.padding) == geometry
    assert_same_bits("weight", conv.weight, before)


@pytest.mark.parametrize(
    "bank, options, message",
    [
        ("haar", {}, "'haar'"),
        ("wavelet", {"pooling": "mean"}, "'mean'"),
        ("wavelet", {"blur": 5}, "blur"),
        ("wavelet", {"blur": 5, "kernel_size": 11}, "blur"),
        ("wavelet", {"stem": "layer1.0.conv1"}, "max pool"),
        (torch.randn(4, 3, 7, 7), {"trainable": False}, "colour times one kernel"),
        (torch.randn(4, 3, 7, 7), {"num_channels": 5}, "num_channels=5"),
        (torch.randn(4, 1, 7, 7), {}, r"\(3, k, k\), got \(4, 1, 7, 7\)"),
        (torch.randn(7, 7), {}, r"got \(7, 7\)"),
    ],
)
def test_initialize_errors_leave_the_model_as_it_was(bank, options, message):
    model = timm.create_model("resnet18")
    before = copy.deepcopy(model.state_dict())
    weight = model.conv1.weight
    with pytest.raises(ValueError, match=message):
        initialize(model, bank, **options)
    assert type(model.conv1) is nn.Conv2d and model.conv1.weight is weight
    assert model.conv1.kernel_size == (7, 7) and model.conv1.padding == (3, 3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert_same_bits(key, after[key], value)


def test_a_converted_model_and_no_model_are_refused():
    model = timm.create_model("resnet18")
    initialize(model)
    with pytest.raises(StemError, match="conv1"):
        initialize(model)
    with pytest.raises(StemError, match="int"):
        initialize(3)


def test_fixed_filters_leave_as_stock_weights():
    """`stock_state_dict` holds the weights they stand for, and `revert` puts them into the stock convolution."""
    model = torchvision.models.resnet18(num_classes=3)
    keys = list(model.state_dict())
    initialize(model, trainable=False)
    weight = model.conv1.weight.detach().clone()
    state = mixpool.stock_state_dict(model)
    assert sorted(state) == sorted(keys) and torch.equal(state["conv1.weight"], weight)
    mixpool.revert(model)
    assert list(model.state_dict()) == keys
    assert type(model.conv1) is nn.Conv2d and torch.equal(model.conv1.weight, weight)
    assert isinstance(model.conv1.weight, nn.Parameter) and model.conv1.weight.requires_grad


def test_nothing_to_scale_by_is_an_error():
    model = torchvision.models.resnet18(num_classes=3)
    with torch.no_grad():
        model.conv1.weight.zero_()
    with pytest.raises(ValueError, match="expected a convolution with initial weights"):
        initialize(model)
    assert type(model.conv1) is nn.Conv2d
    bank = torch.randn(4, 3, 7, 7)
    bank[2] = 0
    with pytest.raises(ValueError, match="none of them zero"):
        initialize(torchvision.models.resnet18(num_classes=3), bank)
