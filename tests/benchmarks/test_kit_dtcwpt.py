"""The packet transform: equal to its filters and to the DT-CWT where it must be, a tight frame, and fast.

Legend: J depth, P = 2**J packets per axis, n = 2 * P * P packets, k taps per side, s stride, N C H W images.
"""

from __future__ import annotations

import copy
import importlib.resources
import itertools
import pickle
import sys
import time
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packet_filters import FAMILIES, cached_filters, explicit

from benchmarks.kit.dtcwpt import DTCWPT
from mixpool.filters.packets import _load_taps

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


# --- errors -----------------------------------------------------------------------------------------------------------


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
