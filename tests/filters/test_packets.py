"""The packets: analytic, tiling the plane, a tight frame, equal to the DT-CWT where they must be, and fast.

Legend: J depth, P = 2**J packets per axis, n = 2 * P * P packets, k taps per side, s stride, N C H W images.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import itertools
import math
import pickle
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixpool.filters.packets import DTCWPT, PacketFilters, _load_taps, dtcwpt_filters

FAMILIES = ("qshift_06", "qshift_a", "qshift_b", "qshift_c", "qshift_d", "qshift_32")
NUM_TAPS = dict(zip(FAMILIES, (10, 10, 14, 16, 18, 32)))
cached_filters = functools.lru_cache(dtcwpt_filters)


def explicit(x: Tensor, filters: PacketFilters, stride: int, padding_mode: str) -> Tensor:
    """(N, C, n, H', W'): the definition, one convolution with all kernels of the padded image."""
    half = filters.kernel_size // 2
    mode = {"symmetric": "symmetric", "circular": "wrap"}[padding_mode]
    padded = torch.from_numpy(np.pad(x.numpy(), [(0, 0)] * 2 + [(half, half)] * 2, mode=mode))
    kernels, planes = filters.kernels[:, None], padded.flatten(0, 1)[:, None]
    parts = [F.conv2d(planes, part.contiguous(), stride=stride) for part in (kernels.real, kernels.imag)]
    return torch.complex(*parts).unflatten(0, x.shape[:2])


def axis_bank(filters: PacketFilters) -> Tensor:
    """(P, 4096) energy spectra of the 1-D packets; bin b is at 2 pi b / 4096 radians per pixel."""
    return torch.fft.fft(filters.axis_kernels, 4096).abs().square()


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("wavelet", FAMILIES)
def test_shapes_norms_and_numbering(depth: int, wavelet: str):
    filters = cached_filters(depth, wavelet)
    packets, taps = 2**depth, NUM_TAPS[wavelet]
    size = taps + 1 + (taps - 1) * (2**depth - 2)
    assert filters.kernel_size == size and size % 2 == 1 and len(filters) == 2 * packets**2
    assert filters.kernels.shape == (2 * packets**2, size, size) and filters.kernels.dtype == torch.complex128
    # The taps of qshift_32 are rounded to 1e-9 relative to an orthonormal pair.
    assert torch.allclose(filters.kernels.abs().square().sum(dim=(1, 2)), torch.tensor(0.5).double(), atol=2e-8, rtol=0)
    iy, ix, sign = filters.packet.unbind(dim=1)
    assert torch.equal((iy * packets + ix) * 2 + (1 - sign) // 2, torch.arange(len(filters)))
    assert filters.center_frequency.dtype == torch.float64 and (filters.center_frequency[:, 0] > 0).all()
    assert torch.equal(filters.center_frequency[:, 1].sign(), sign.double())


# Largest energy ratio of an interior 1-D packet and that of the two outer ones, at depths 2 and 3.
ANALYTICITY = {
    "qshift_06": (0.0034, 0.206, 0.0070, 0.173),
    "qshift_a": (0.0016, 0.205, 0.0025, 0.172),
    "qshift_b": (0.0001, 0.223, 0.0001, 0.224),
    "qshift_c": (0.0001, 0.221, 0.0001, 0.220),
    "qshift_d": (0.0001, 0.224, 0.0001, 0.230),
    "qshift_32": (0.0001, 0.222, 0.0001, 0.222),
}


@pytest.mark.parametrize("wavelet", FAMILIES)
@pytest.mark.parametrize("depth", [2, 3])
def test_all_packets_but_the_outermost_are_analytic(depth: int, wavelet: str):
    filters, last = cached_filters(depth, wavelet), 2**depth - 1
    interior, outer = ANALYTICITY[wavelet][2 * depth - 4 : 2 * depth - 2]
    is_outer = (filters.packet[:, :2] == 0) | (filters.packet[:, :2] == last)
    assert filters.negative_energy[~is_outer].max() < interior + 5e-5
    assert (filters.negative_energy[is_outer] - outer).abs().max() < 1e-3
    assert torch.equal(filters.is_analytic(), ~is_outer.any(dim=1))
    assert filters.is_analytic().sum() == {2: 8, 3: 72}[depth]
    assert filters.is_analytic(limit=0.5).all()


def test_the_ratios_are_those_of_the_kernels():
    filters, size = cached_filters(2), 128
    energy = torch.fft.fft2(filters.kernels, s=(size, size)).abs().square()
    for axis in (0, 1):
        line = energy.sum(dim=2 - axis)
        up, down = line[:, : size // 2 + 1], torch.cat([line[:, size // 2 :], line[:, :1]], dim=1)
        if axis == 1:
            is_plus = filters.packet[:, 2:] > 0
            up, down = torch.where(is_plus, up, down), torch.where(is_plus, down, up)
        ratio = torch.trapezoid(down) / torch.trapezoid(up)
        torch.testing.assert_close(ratio, filters.negative_energy[:, axis], atol=1e-3, rtol=0)


@pytest.mark.parametrize("wavelet", ["qshift_06", "qshift_a", "qshift_b"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_center_frequencies_tile_the_plane(depth: int, wavelet: str):
    filters, packets = cached_filters(depth, wavelet), 2**depth
    band = filters.center_frequency.abs() * packets / math.pi
    assert torch.equal(band.floor().long(), filters.packet[:, :2]), "one packet in each square, and in its own"
    cells = (filters.center_frequency * packets / math.pi).floor().long()
    assert len(set(map(tuple, cells.tolist()))) == len(filters)
    # The peaks too: bin / 4096 * 2 pi, in units of the band.
    peak = axis_bank(filters).argmax(dim=1) / 4096 * 2 * packets
    assert torch.equal(peak.floor().long(), torch.arange(packets))
    centroid = band[filters.packet[:, 0] == filters.packet[:, 1], 0][::2]
    assert (peak - centroid).abs().max() < {2: 0.25, 3: 0.4, 4: 0.6}[depth]


def test_kernels_peak_at_their_center_frequency():
    filters = cached_filters(2)
    energy = torch.fft.fft2(filters.kernels, s=(64, 64)).abs().square()
    index = energy.flatten(1).argmax(dim=1)
    peak = torch.stack([index // 64, index % 64], dim=1)
    peak = torch.where(peak >= 32, peak - 64, peak) * (2 * math.pi / 64)
    assert ((peak - filters.center_frequency).abs() < math.pi / 4 * 0.3).all()


def test_spectra_of_all_packets_sum_to_a_constant():
    energy = torch.fft.fft2(cached_filters(2).kernels, s=(64, 64)).abs().square().sum(dim=0)
    mirrored = energy.flip(0, 1).roll((1, 1), dims=(0, 1))
    assert torch.allclose((energy + mirrored) / 2, torch.tensor(16.0).double(), atol=1e-10)


def test_filters_of_one_call_are_their_own():
    filters = dtcwpt_filters(2)
    filters.axis_kernels.zero_()
    assert dtcwpt_filters(2).axis_kernels.abs().sum() > 0 and DTCWPT(2).trees.abs().sum() > 0


def test_filters_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        filters = dtcwpt_filters(2)
    assert torch.equal(filters.kernels, cached_filters(2).kernels)
    assert torch.equal(filters.center_frequency, cached_filters(2).center_frequency)


# --- an independent transform, level by level -------------------------------------------------------------------------


def packet_tree(x: Tensor, depth: int, wavelet: str, rule: str = "paper") -> Tensor:
    """(P, 2, ..., L / P): both real packet trees along the last axis, filtered and decimated level by level, circular.

    Rules that break the pairing: "no_switch", tree 2 keeps its own pair after a high branch; "early_switch", it has
    it on level 2 only; "advance", the high filter of level 1 comes one sample earlier in tree 2, not later.
    """
    taps = _load_taps(wavelet)

    def branch(x: Tensor, h: np.ndarray, delay: int = 0) -> Tensor:
        return sum(float(h[m]) * x.roll(-m - delay, dims=-1) for m in range(len(h)))[..., ::2]

    delays = (1, -1 if rule == "advance" else 1)
    nodes = {(i,): (branch(x, taps[f"h{i}a"]), branch(x, taps[f"h{i}a"], delays[i])) for i in (0, 1)}
    for level in range(1, depth):
        children = {}
        for path, (first, second) in nodes.items():
            is_common = (any(path[1:]) and rule != "no_switch") or (rule == "early_switch" and level > 1)
            for i in (0, 1):
                # h1b changes its sign, so that all packets come to the same side.
                other = taps[f"h{i}a"] if is_common else taps[f"h{i}b"] * (-1) ** i
                children[(*path, i)] = (branch(first, taps[f"h{i}a"]), branch(second, other))
        nodes = children
    # By rising frequency: the bits of the packet's number are the parities of the high branches so far (Gray code).
    number = {path: sum((sum(path[: i + 1]) % 2) << (depth - 1 - i) for i in range(depth)) for path in nodes}
    return torch.stack([torch.stack(nodes[path]) for path in sorted(nodes, key=number.__getitem__)])


def interior_ratios(wavelet: str, rule: str) -> Tensor:
    """(6,) negative over positive energy of the interior 1-D packets at depth 3; below 1 also for the wrong side."""
    impulses = torch.eye(256, dtype=torch.float64)
    first, second = packet_tree(impulses, 3, wavelet, rule)[1:-1, :, :, 0].unbind(dim=1)  # (P - 2, 256), the kernels
    energy = torch.fft.fft(torch.complex(first, second)).abs().square()
    sides = torch.stack([energy[:, 1:128].sum(dim=1), energy[:, 129:].sum(dim=1)])
    return sides.amin(dim=0) / sides.amax(dim=0)


def test_analyticity_depends_on_the_rule():
    for wavelet in ("qshift_a", "qshift_b"):
        assert (interior_ratios(wavelet, "paper") < 0.003).all()
        assert (interior_ratios(wavelet, "no_switch") > 0.04).sum() == 4
        assert (interior_ratios(wavelet, "early_switch") > 0.04).sum() == 2
        spoilt = interior_ratios(wavelet, "advance")
        assert (spoilt > 0.05).sum() == 3 and spoilt.max() > 0.5, "the packets of the upper half band"


@pytest.mark.parametrize("wavelet", ["qshift_a", "qshift_b"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_module_is_the_decimated_filter_bank(depth: int, wavelet: str):
    x = torch.randn(2, 1, 32, 48, dtype=torch.float64)
    transform = DTCWPT(depth, wavelet, padding_mode="circular")
    half = transform.trees.shape[-1] // 2
    along_x = packet_tree(x.roll((half, half), dims=(2, 3)), depth, wavelet)  # (Px, tree, N, C, H, W')
    trees = packet_tree(along_x.transpose(-1, -2), depth, wavelet)  # (Py, tree, Px, tree, N, C, W', H')
    trees = trees.permute(4, 5, 0, 2, 1, 3, 7, 6)  # (N, C, Py, Px, tree_y, tree_x, H', W')
    (aa, ab), (ba, bb) = (tree.unbind(4) for tree in trees.unbind(4))
    expected = torch.stack([torch.complex(aa - bb, ab + ba), torch.complex(aa + bb, ba - ab)], dim=4) / math.sqrt(8)
    torch.testing.assert_close(transform(x), expected.flatten(2, 4), atol=1e-10, rtol=0)


# --- the transform ----------------------------------------------------------------------------------------------------

# (depth, wavelet, N, C, H, W)
CASES = [
    (1, "qshift_a", 2, 3, 7, 10),  # odd, H != W, about the kernel's size
    (1, "qshift_32", 1, 1, 5, 3),  # much smaller than the kernel
    (2, "qshift_a", 2, 2, 33, 20),
    (2, "qshift_06", 1, 1, 16, 16),
    (2, "qshift_b", 1, 2, 9, 40),
    (2, "qshift_c", 1, 1, 17, 15),
    (2, "qshift_d", 1, 1, 1, 30),  # one row
    (3, "qshift_a", 1, 2, 37, 50),
    (3, "qshift_b", 1, 1, 24, 41),
    (4, "qshift_a", 1, 1, 35, 18),
]


@pytest.mark.parametrize("padding_mode", ["symmetric", "circular"])
@pytest.mark.parametrize("half_stride", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("depth, wavelet, num, channels, height, width", CASES)
def test_separable_equals_explicit(depth, wavelet, num, channels, height, width, half_stride, padding_mode):
    x = torch.randn(num, channels, height, width, dtype=torch.float64)
    stride = 2**depth // (2 if half_stride else 1)
    out = DTCWPT(depth, wavelet, stride, padding_mode)(x)
    filters = cached_filters(depth, wavelet)
    assert out.shape == (num, channels, len(filters), -(-height // stride), -(-width // stride))
    assert out.dtype == torch.complex128 and out.is_contiguous()
    torch.testing.assert_close(out, explicit(x, filters, stride, padding_mode), atol=1e-10, rtol=0)


@pytest.mark.parametrize("wavelet", FAMILIES)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_frame_is_tight(depth: int, wavelet: str):
    """All singular values of the transform of a periodic image are 1, and 2 with the last level undecimated."""
    height, width = 2**depth * 2, 2**depth
    impulses = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    # because the taps of qshift_32 are normalised to 1.5e-9 only, and a packet takes 2 J of them
    tolerance = 2e-8 if wavelet == "qshift_32" else 1e-12
    for stride, bound in ((2**depth, 1.0), (2 ** (depth - 1), 2.0)):
        out = DTCWPT(depth, wavelet, stride, "circular")(impulses).flatten(1)
        singular = torch.linalg.svdvals(torch.view_as_real(out).flatten(1))
        assert (singular - bound).abs().max() < tolerance * bound


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_energy_is_preserved(depth: int):
    x = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    energy = DTCWPT(depth, padding_mode="circular")(x).abs().square().sum(dim=(2, 3, 4))
    assert torch.allclose(energy, x.square().sum(dim=(2, 3)), rtol=1e-12)


def test_energy_of_a_mirrored_image_is_nearly_preserved():
    x = F.avg_pool2d(torch.randn(1, 1, 266, 266), 11, stride=1)
    ratio = DTCWPT(2)(x).abs().square().sum() / x.square().sum()
    assert abs(ratio - 1) < 0.05


@pytest.mark.parametrize("depth", [2, 3])
def test_a_wave_excites_the_packet_of_its_frequency(depth: int):
    filters, stride = cached_filters(depth), 2**depth
    index = filters.is_analytic().nonzero().flatten()[:: 1 if depth == 2 else 5]
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    transform = DTCWPT(depth)
    for i in index.tolist():
        fy, fx = filters.center_frequency[i].tolist()
        out = transform(torch.cos(fy * y + fx * x + 0.3)[None, None])[0, 0]
        inside = out[:, 6:-6, 6:-6]
        assert inside.abs().square().sum(dim=(1, 2)).argmax() == i
        wave = inside[i]
        assert wave.abs().std() < 0.1 * wave.abs().mean(), "the modulus of a wave is constant"
        # Cross-correlation: the coefficient of a real wave turns backwards.
        turn = torch.tensor([-fx * stride]).double()
        step = (wave[:, 1:] * wave[:, :-1].conj()).mean()
        assert torch.cos(step.angle() - turn) > 0.99
        assert abs(torch.sin(step.angle() - turn)) < 0.1


# --- against the ordinary dual-tree transform -------------------------------------------------------------------------

# Sub-band of DTCWTForward -> (iy, ix, sign), its phase against ours from level 2 on, and whether it is our conjugate.
SUBBANDS = [
    ((1, 0, 1), 1j, False),
    ((1, 1, 1), -1, False),
    ((0, 1, 1), 1j, False),
    ((0, 1, -1), 1j, True),
    ((1, 1, -1), 1, True),
    ((1, 0, -1), -1j, True),
]


@pytest.fixture(scope="module")
def dtcwt_forward():
    """pytorch_wavelets.DTCWTForward, whose import needs the pkg_resources that newer setuptools lack."""
    stub = types.ModuleType("pkg_resources")
    stub.resource_stream = lambda package, name: (importlib.resources.files(package) / name).open("rb")
    missing = importlib.util.find_spec("pkg_resources") is None
    if missing:
        sys.modules["pkg_resources"] = stub
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pytorch_wavelets import DTCWTForward
    finally:
        if missing:
            del sys.modules["pkg_resources"]
    return DTCWTForward


@pytest.fixture
def float64_default():
    """DTCWTForward takes its taps to the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("wavelet", ["qshift_06", "qshift_a", "qshift_b", "qshift_c", "qshift_d"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_first_packets_are_the_dual_tree_transform(dtcwt_forward, float64_default, depth: int, wavelet: str):
    """The three pairs of packets next to (0, 0) are the six sub-bands of level J: times 2, a phase, and a shift.

    For this DTCWTForward must have our level-1 filters; its own are biorthogonal. They are (h0b, h1b), the mirrored
    (h0a, h1a), as it convolves and we correlate; the zero makes their length odd. Its samples lie 2**(J-1) - 1 pixels
    after ours. All other packets split what the dual-tree transform keeps as one sub-band of a finer level.
    """
    taps, filters, transform = _load_taps(wavelet), cached_filters(depth, wavelet), DTCWPT(depth, wavelet)
    level_1 = tuple(np.pad(taps[name], (1, 0)) for name in ("h0b", "h1b"))
    x = torch.randn(1, 2, 160, 192)
    _, highs = dtcwt_forward(J=depth, biort=level_1, qshift=wavelet)(x)
    expected = torch.view_as_complex(highs[depth - 1])  # (N, C, 6, H', W')
    shift = 2 ** (depth - 1) - 1
    out = transform(x.roll((-shift, -shift), dims=(2, 3)))
    margin = filters.kernel_size // 2 // 2**depth + 2  # the two extend the image differently
    inside = (..., slice(margin, -margin), slice(margin, -margin))
    for subband, (packet, phase, is_conjugate) in enumerate(SUBBANDS):
        row = filters.packet.tolist().index(list(packet))
        ours = out[:, :, row].conj() if is_conjugate else out[:, :, row]
        theirs = expected[:, :, subband][inside]
        assert theirs.numel() >= 24
        torch.testing.assert_close(2 * (1 if depth == 1 else phase) * ours[inside], theirs, atol=1e-10, rtol=0)


# --- a module among modules -------------------------------------------------------------------------------------------


def test_dtypes_and_autocast():
    transform, x = DTCWPT(2), torch.randn(2, 3, 21, 26)
    truth = transform(x.double())
    assert truth.dtype == torch.complex128
    single = transform(x)
    assert single.dtype == torch.complex64 and torch.allclose(single, truth.to(torch.complex64), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform(x), single)
    for dtype in (torch.float16, torch.bfloat16):
        half = transform(x.to(dtype))
        assert half.dtype == torch.complex64 and torch.equal(half, transform(x.to(dtype).float()))
    # The module's dtype is no matter: the taps stay exact.
    for cast in (transform.half(), transform.double(), copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(cast(x.double()), truth) and torch.equal(cast(x), single)


def test_layouts_and_empty_batches():
    transform, x = DTCWPT(2), torch.randn(2, 3, 21, 26)
    out = transform(x)
    assert torch.equal(transform(x.to(memory_format=torch.channels_last)), out)
    large = torch.randn(4, 6, 42, 26)
    assert torch.equal(transform(large[::2, 1::2, ::2]), transform(large[::2, 1::2, ::2].contiguous()))
    assert transform(x[:0]).shape == (0, 3, 32, 6, 7)
    assert torch.allclose(transform(x[1:])[0], out[1], atol=1e-6)
    assert transform(torch.zeros(1, 1, 8, 8)).count_nonzero() == 0


def test_module_keeps_no_state_and_two_runs_agree():
    transform, x = DTCWPT(2), torch.randn(1, 3, 40, 40)
    assert transform.state_dict() == {} and list(transform.parameters()) == []
    transform.load_state_dict({})
    assert torch.equal(transform(x), transform(x)) and torch.equal(transform(x), DTCWPT(2)(x))
    assert repr(transform) == "DTCWPT(2, 'qshift_a', stride=4, padding_mode='symmetric')"


def test_module_can_be_born_on_the_meta_device():
    with torch.device("meta"):
        transform = DTCWPT(2)
    assert transform.trees.is_meta
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(transform.to_empty(device="cpu")(x), DTCWPT(2)(x))


@pytest.mark.parametrize("padding_mode", ["symmetric", "circular"])
def test_gradients(padding_mode: str):
    x = torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(DTCWPT(1, padding_mode=padding_mode), (x,))
    assert torch.autograd.gradcheck(lambda x: DTCWPT(2, stride=2, padding_mode=padding_mode)(x).abs().sum(2), (x,))


def test_compiles():
    transform, x = DTCWPT(2), torch.randn(1, 1, 20, 20)
    assert torch.allclose(torch.compile(transform, backend="eager")(x), transform(x), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    x = torch.randn(2, 3, 50, 37)
    for transform in (DTCWPT(3), DTCWPT(2, "qshift_b", stride=2, padding_mode="circular")):
        truth = transform(x.double())
        cuda = copy.deepcopy(transform).cuda()
        assert cuda.trees.dtype == torch.float64 and cuda.trees.is_cuda
        torch.testing.assert_close(cuda(x.cuda().double()).cpu(), truth, atol=1e-10, rtol=0)
        torch.testing.assert_close(cuda(x.cuda()).cpu(), truth.to(torch.complex64), atol=1e-5, rtol=0)
        with torch.autocast("cuda", dtype=torch.float16):
            assert torch.equal(cuda(x.cuda()), cuda(x.cuda().to(memory_format=torch.channels_last)))


# --- errors and imports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 5, -1, 2.0, "2", True])
def test_depth_must_be_one_to_four(depth):
    dtcwpt_filters(2), dtcwpt_filters(1)  # what is cached does not excuse what is wrong
    for build in (dtcwpt_filters, DTCWPT):
        with pytest.raises(ValueError, match="expected a depth from 1 to 4, got"):
            build(depth)


@pytest.mark.parametrize("wavelet", ["haar", "qshift_b_bp", "farras", "near_sym_a", ""])
def test_unknown_wavelets_name_the_known_ones(wavelet: str):
    for build in (dtcwpt_filters, DTCWPT):
        with pytest.raises(ValueError) as error:
            build(2, wavelet)
        assert all(repr(name) in str(error.value) for name in (*FAMILIES, wavelet))


def test_other_errors():
    with pytest.raises(ValueError, match="expected a stride of 8 or 4 at depth 3, got stride=2"):
        DTCWPT(3, stride=2)
    with pytest.raises(ValueError, match="padding_mode"):
        DTCWPT(2, padding_mode="zeros")
    transform = DTCWPT(1)
    for x in (
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.complex64),
        torch.zeros(1, 1, 0, 8),
        np.zeros((1, 1, 8, 8)),
    ):
        with pytest.raises(ValueError, match=r"expected a real floating-point image batch \(N, C, H, W\), got"):
            transform(x)


def test_tables_are_read_without_importing_what_breaks():
    code = (
        "import sys, mixpool.filters.packets as d; d.DTCWPT(2); "
        "print({'pytorch_wavelets', 'pywt', 'scipy', 'pkg_resources'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "set()"


# --- speed ------------------------------------------------------------------------------------------------------------


def test_five_times_faster_than_the_explicit_kernels():
    filters, transform = cached_filters(3), DTCWPT(3)
    x = torch.randn(1, 1, 224, 224)
    half = filters.kernel_size // 2
    padded = F.pad(x, (half,) * 4, mode="reflect")
    bank = torch.cat([filters.kernels.real, filters.kernels.imag])[:, None].float().contiguous()
    seconds = {"separable": [], "explicit": []}
    with torch.inference_mode():
        for _, (name, run) in itertools.product(
            range(8),
            {"separable": lambda: transform(x), "explicit": lambda: F.conv2d(padded, bank, stride=8)}.items(),
        ):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    # The least of several, side by side: what else runs on the machine only adds.
    assert min(seconds["explicit"]) > 5 * min(seconds["separable"])
