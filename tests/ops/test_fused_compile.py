"""What the compiled kernels of the fused path take of a GPU: registers, shared memory, tensor cores. No GPU needed.

tests/offline_compile.py compiles them, in a process of its own; about a second per kernel.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import offline_compile
import pytest

from mixpool.ops.fused.blocks import blocks_for, shared_bytes
from mixpool.ops.fused.geometry import StemGeometry

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}

# Bytes that a kernel may spill on sm_90 in bfloat16 and float16, by kernel, stem and layout. All others: none.
# The gradients by the images are not a default; they take registers for addresses of the convolution's map.
ALLOWED_SPILLS = {
    # In NCHW gradients come in pieces of 2 bytes, each with an address of its own. Fewer channels per program would not
    # use the tensor core for the gradient of the matrix.
    ("max backward, statistics", "resnet", "NCHW"): 32,
    # Twelve slices in shared memory, whose descriptors are kept. AlexNet itself has no batch normalization.
    ("max backward, statistics", "alexnet", "channels_last"): 200,
    ("max backward, statistics", "alexnet", "NCHW"): 200,
    # The same twelve slices. Chunks of 3 instead of 4 compute the products once more and still spill 20 to 36 bytes.
    ("modulus3 backward", "alexnet", "channels_last"): 64,
    ("modulus3 backward", "alexnet", "NCHW"): 64,
    ("modulus3 backward, statistics", "alexnet", "channels_last"): 64,
    ("modulus3 backward, statistics", "alexnet", "NCHW"): 64,
    **{
        (f"{kind} backward, images too", stem, layout): 200 if stem == "alexnet" else 64
        for kind, stem, layout in itertools.product(("max", "modulus3"), ("resnet", "alexnet"), offline_compile.LAYOUTS)
    },
}


def compiled(*commands: str) -> list[list[dict]]:
    """What offline_compile.py prints for each list of options, all in one process: to start one takes seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(offline_compile.__file__)), *" + ".join(commands).split()]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    answers = [[json.loads(line) for line in answer.splitlines()] for answer in process.stdout.split("\n\n")]
    assert len(answers) == len(commands) and all(answers), "no kernel is named so"
    return answers


def faults(found: dict) -> list[str]:
    """What is wrong with a kernel, apart from spills."""
    limit = offline_compile.SHARED_MEMORY[found["arch"]]
    expected = found.get("shared_expected", limit)
    faults = []
    if found["shared"] > limit:
        faults.append(f"{found['shared']} bytes of shared memory, the architecture has {limit}")
    if found["shared"] > expected:
        faults.append(f"{found['shared']} bytes of shared memory, mixpool.ops.fused.blocks expected {expected}")
    if found["registers"] > 255:
        faults.append(f"{found['registers']} registers")
    if found["serialized"]:
        faults.append("serialized wgmma")
    if "blocks" in found and not found[TENSOR_CORE[found["arch"]]]:
        faults.append(f"no {TENSOR_CORE[found['arch']]}")
    return faults


def spills(found: dict) -> list[str]:
    allowed = ALLOWED_SPILLS.get((found["kernel"], found["stem"], found["layout"]), 0)
    return [f"spills {found['spilled']} bytes, allowed {allowed}"] if found["spilled"] > allowed else []


def report(kernels: list[dict], *checks) -> list[str]:
    return [f"{k['kernel']} ({k['arch']} {k['stem']}): {fault}" for k in kernels for c in checks for fault in c(k)]


@needs_triton
@pytest.mark.slow
def test_the_defaults_on_hopper_do_not_spill() -> None:
    resnet, alexnet = compiled(
        "--arch 90 --stem resnet",
        r"--arch 90 --stem alexnet --only (max|modulus\d).(forward|backward(,.stat|$))",
    )
    assert (len({k["kernel"] for k in resnet}), len({k["kernel"] for k in alexnet})) == (30, 15)
    assert not report(resnet + alexnet, faults, spills)


@needs_triton
@pytest.mark.slow
def test_samples_of_other_defaults_on_hopper_do_not_spill() -> None:
    for kernels in compiled(
        "--arch 90 --stem resnet --layout NCHW --dtype float16 --only (max|modulus3).(backward,.stat|forward,.stat)",
        "--arch 90 --stem alexnet --layout NCHW --only modulus3.(backward|forward,.inf)$",
    ):
        assert not report(kernels, faults, spills)


@needs_triton
@pytest.mark.slow
def test_samples_fit_every_architecture() -> None:
    for kernels in compiled(
        "--arch 80 --stem resnet --only max.forward,.statistics|max.backward,.statistics",
        "--arch 80 --stem alexnet --dtype float32 --only modulus3.backward$",
        "--arch 89 --stem alexnet --only modulus1.backward$",
        "--arch 89 --stem resnet --dtype float32 --channels 25 --layout NCHW --only max.backward,.statistics",
        "--arch 90 --stem resnet --dtype float32 --only modulus3.backward$",
        "--arch 90 --stem resnet --input-dtype float32 --only modulus3.backward,.statistics",
        "--arch 100 --stem resnet --only max.forward,.statistics|modulus3.backward$",
        "--arch 120 --stem squeezenet --only modulus3.backward$",
        "--arch 90 --stem shufflenet cifar --channels 32 --only max.forward,.inference",
    ):
        assert not report(kernels, faults)


@needs_triton
@pytest.mark.slow
def test_these_tests_can_fail() -> None:
    """Blocks for another GPU are too large, those for more threads spill, those that are too small use no wgmma."""
    (large,), (small,) = compiled(
        "--arch 89 --only modulus3.backward$ --blocks rows=128 num_warps=4", "--only max.backward$ --blocks group=16"
    )
    assert any("the architecture has" in fault for fault in faults(large))
    assert spills(large)
    assert "no wgmma" in faults(small)


@pytest.mark.parametrize("arch", offline_compile.SHARED_MEMORY)
def test_every_choice_expects_to_fit(arch: int) -> None:
    limit = offline_compile.SHARED_MEMORY[arch]
    for stem, kind, purpose, n_channels, dtype in itertools.product(
        offline_compile.STEMS,
        offline_compile.KINDS,
        ("inference", "training", "backward"),
        (8, 25, 32, 64, 96),
        offline_compile.DTYPES.values(),
    ):
        depth = StemGeometry(*offline_compile.STEMS[stem], 3, 224, 224).depth(kind)
        blocks = blocks_for(kind, purpose, n_channels, depth, dtype.itemsize, limit)
        expected = shared_bytes(kind, purpose, blocks, depth, dtype.itemsize)
        assert expected <= limit, (stem, kind, purpose, n_channels, dtype, blocks)
