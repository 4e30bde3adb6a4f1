"""Compile the fused kernels for a GPU that is not there, and print what they take: a line of JSON for each kernel.

    python tests/offline_compile.py --arch 80 90 --stem resnet alexnet --dtype bfloat16 --layout channels_last NCHW

Several such lists of options may follow each other, with a `+` between them; an empty line then ends each answer. About
a second per kernel. In a process of its own: where Triton interprets (TRITON_INTERPRET=1, as in the tests), it
cannot compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# Bytes of shared memory that a block can have. CUDA C++ Programming Guide, Compute Capabilities, Technical
# Specifications: "Maximum amount of shared memory per thread block".
SHARED_MEMORY = {arch: kib * 1024 for arch, kib in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()}

STEMS = {  # kernel, stride, padding, pool padding, ceil_mode
    "resnet": (7, 2, 3, 1, False),
    "alexnet": (11, 4, 2, 0, False),
    "squeezenet": (7, 2, 0, 0, True),
    "shufflenet": (3, 2, 1, 1, False),
    "cifar": (5, 1, 2, 1, False),
}
KINDS = ("max", "modulus1", "modulus3")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int64: "*i64",
}


def calls(
    stem: str,
    dtype: torch.dtype,
    input_dtype: torch.dtype,
    layout: str,
    n_channels: int,
    shared_memory: int,
    replaced: dict[str, int],
) -> Iterator[tuple]:
    """(name, call, matrix or None) of the kernels that a stem of 2 n_channels launches, from tensors without storage.

    `replaced` are fields of the blocks that are not to be those of mixpool.ops.fused.blocks.
    """
    from mixpool.ops.fused import launch
    from mixpool.ops.fused.geometry import StemGeometry, padded_places

    geometry = StemGeometry(*STEMS[stem], 3, 224, 224)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        memory_format = LAYOUTS[layout] if len(size) == 4 else torch.contiguous_format
        return torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)

    def matrix_of(kind: str, purpose: str) -> tuple[launch.Matrix, Tensor]:
        matrix = launch.Matrix.of(kind, geometry, n_channels, dtype, purpose, shared_memory)
        if replaced:
            blocks = matrix.blocks._replace(**replaced)
            matrix = launch.Matrix.cut(kind, blocks, n_channels, geometry.depth(kind))
        return matrix, empty(matrix.groups, matrix.depth, matrix.columns, dtype=dtype)

    x = empty(256, 3, 224, 224, dtype=input_dtype)
    out = empty(256, 2 * n_channels, *geometry.pooled_size, dtype=dtype)
    channels = empty(n_channels, dtype=torch.int64)
    vector, moments = empty(2 * n_channels), empty(2, 2 * n_channels)
    weight, imag = (empty(n, 3, *[geometry.kernel_size] * 2) for n in (2 * n_channels, n_channels))
    for kind in KINDS:
        matrix, packed = matrix_of(kind, "inference")
        yield f"pack {kind}", launch.pack(matrix, geometry, x, weight, imag, channels, packed), None
        call, _ = launch.forward(matrix, geometry, x, packed, channels, out)
        yield f"{kind} forward, inference", call, matrix

        matrix, packed = matrix_of(kind, "training")
        argmax = (
            empty(256, padded_places(n_channels), *geometry.pooled_size, dtype=torch.int8) if kind == "max" else None
        )
        arguments = (matrix, geometry, x, packed, channels, out)
        call, sums = launch.forward(*arguments, argmax=argmax, pivot=vector, with_sums=True)
        yield f"{kind} forward, statistics", call, matrix
        yield f"{kind} forward, training", launch.forward(*arguments, argmax=argmax)[0], matrix
        yield f"{kind} statistics", launch.finish_moments(kind, sums, channels, vector, moments, 10**6), None

        matrix, packed = matrix_of(kind, "backward")
        arguments = (matrix, geometry, x, packed, channels, out)
        yield f"{kind} spread", launch.spread_moments(matrix, moments, moments, channels, 10**6)[0], None
        for name, options in {
            "": {},
            ", statistics": {"coefficients": vector},
            ", images too": {"coefficients": vector, "grad_conv": out},
        }.items():
            call, partial = launch.backward(*arguments, argmax=argmax, **options)
            yield f"{kind} backward{name}", call, matrix
        yield f"unpack {kind}", launch.unpack(matrix, geometry, x, partial[0], channels, weight, imag), None


def compile_call(call, arch: int):
    """What Triton's compiler makes of a call on an architecture, with the hints that its launcher would give."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(call.kernel.params):
        value, name = call.arguments[parameter.name], parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            hints[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[(index,)] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                hints[(index,)] = [["tt.divisibility", 16]]
    assert set(call.arguments) == set(signature), set(call.arguments) ^ set(signature)
    source = ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": call.num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, arch: int) -> dict[str, int]:
    """Registers per thread, bytes spilled, bytes of shared memory, and tensor core instructions by kind."""
    from triton import knobs

    assembler = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    text = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(text)
        name = f"sm_{arch}" + ("a" if arch >= 90 else "")
        log = subprocess.run(
            [assembler, "-v", f"--gpu-name={name}", str(ptx), "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", log)[1]),
        "shared": compiled.metadata.shared,
        "wgmma": text.count("wgmma.mma_async"),
        "mma.sync": text.count("mma.sync"),
        "tcgen05": text.count("tcgen05.mma"),
        "serialized": int("wgmma" in log and "serializ" in log),
    }


def choice(name: str, matrix, dtype: torch.dtype) -> dict:
    """The blocks of a kernel, and the shared memory that they were chosen for."""
    from mixpool.ops.fused.blocks import shared_bytes

    purpose = "backward" if "backward" in name else "inference"
    expected = shared_bytes(matrix.kind, purpose, matrix.blocks, matrix.depth, dtype.itemsize)
    return {"shared_expected": expected, "blocks": matrix.blocks._asdict()}


def field(text: str) -> tuple[str, int]:
    """("rows", 128) of "rows=128"."""
    name, value = text.split("=")
    return name, int(value)


def main() -> None:
    commands = [[]]
    for argument in sys.argv[1:]:
        commands[-1].append(argument) if argument != "+" else commands.append([])
    for number, arguments in enumerate(commands):
        print(end="\n" if number else "")
        answer(arguments)


def answer(arguments: list[str]) -> None:
    """Print a line of JSON for each kernel that these options name."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=SHARED_MEMORY, help="90 is sm_90")
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=DTYPES, help="of the products; float32 is TF32"
    )
    parser.add_argument("--input-dtype", choices=DTYPES, help="of the images, if not that of the products")
    parser.add_argument("--stem", nargs="+", default=["resnet"], choices=STEMS)
    parser.add_argument("--layout", nargs="+", default=["channels_last"], choices=LAYOUTS)
    parser.add_argument("--channels", type=int, nargs="+", default=[64], help="of a kind")
    parser.add_argument("--only", default="", help="a regular expression that the kernels' names contain")
    parser.add_argument("--blocks", type=field, nargs="+", default=[], metavar="FIELD=N", help="instead of the table's")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("unset TRITON_INTERPRET: where Triton interprets, it cannot compile")
    for case in itertools.product(options.arch, options.dtype, options.stem, options.layout, options.channels):
        arch, dtype, stem, layout, n_channels = case
        where = dict(zip(("arch", "dtype", "stem", "layout", "channels"), case, strict=True))
        dtypes = (DTYPES[dtype], DTYPES[options.input_dtype or dtype])
        kernels = calls(stem, *dtypes, layout, n_channels, SHARED_MEMORY[arch], dict(options.blocks))
        for name, call, matrix in kernels:
            if re.search(options.only, name):
                found = resources(compile_call(call, arch), arch)
                found |= {} if matrix is None else choice(name, matrix, dtypes[0])
                print(json.dumps({"kernel": name, **where, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
