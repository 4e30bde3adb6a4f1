"""Compile the fused kernels for a GPU that is not there, and say what they take; run as a script, it prints JSON lines.

    python tests/offline_compile.py --arch 90 --dtype bfloat16 [--stem resnet] [--layout channels_last]

In a process of its own: one that interprets Triton (TRITON_INTERPRET=1, as the tests do) cannot compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

STEMS = {  # kernel, stride, padding, pool padding, ceil_mode
    "resnet": (7, 2, 3, 1, False),
    "alexnet": (11, 4, 2, 0, False),
    "squeezenet": (7, 2, 0, 0, True),
    "shufflenet": (3, 2, 1, 1, False),
    "cifar": (5, 1, 2, 1, False),
}
KINDS = ("max", "modulus1", "modulus3")


def calls(stem: str, dtype: torch.dtype, layout: str, n_channels: int, input_dtype: torch.dtype) -> Iterator[tuple]:
    """(name, call) of every kernel that a stem launches, made from tensors without storage."""
    from mixpool.fused import launch
    from mixpool.fused.geometry import StemGeometry

    geometry = StemGeometry(*STEMS[stem], 3, 224, 224)
    as_layout = {"memory_format": torch.channels_last if layout == "channels_last" else torch.contiguous_format}

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta", **(as_layout if len(size) == 4 else {}))

    x = empty(256, 3, 224, 224, dtype=input_dtype)
    out = empty(256, 2 * n_channels, *geometry.pooled_size, dtype=dtype)
    channels = empty(n_channels, dtype=torch.int64)
    vector, moments = empty(2 * n_channels), empty(2, 2 * n_channels)
    weight, imag = torch.empty(2 * n_channels, 3, 7, 7), torch.empty(n_channels, 3, 7, 7)
    for kind in KINDS:
        matrix = launch.Matrix.of(kind, geometry, n_channels, dtype, "inference")
        packed = empty(matrix.groups, matrix.depth, matrix.columns, dtype=dtype)
        argmax = empty(256, n_channels, *geometry.pooled_size, dtype=torch.int8) if kind == "max" else None
        yield f"pack {kind}", launch.pack(matrix, geometry, x, weight, imag, channels, packed)
        arguments = (matrix, geometry, x, packed, channels, out)
        yield (
            f"{kind} forward, inference",
            launch.forward(*arguments, scale=vector, shift=vector, relu=True)[0],
        )
        matrix = launch.Matrix.of(kind, geometry, n_channels, dtype, "training")
        packed = empty(matrix.groups, matrix.depth, matrix.columns, dtype=dtype)
        arguments = (matrix, geometry, x, packed, channels, out)
        call, sums = launch.forward(*arguments, argmax=argmax, with_sums=True)
        yield f"{kind} forward, statistics", call
        yield f"{kind} forward, training", launch.forward(*arguments, argmax=argmax)[0]
        yield f"{kind} statistics", launch.finish_moments(kind, sums, channels, moments, 10**6)

        matrix = launch.Matrix.of(kind, geometry, n_channels, dtype, "backward")
        packed = empty(matrix.groups, matrix.depth, matrix.columns, dtype=dtype)
        arguments = (matrix, geometry, x, packed, channels, out)
        yield f"{kind} spread", launch.spread_moments(matrix, moments, moments, channels, 10**6)[0]
        for name, options in {
            "": {},
            ", statistics": {"coefficients": vector},
            ", images too": {"coefficients": vector, "grad_conv": out},
        }.items():
            call, partial = launch.backward(*arguments, argmax=argmax, **options)
            yield f"{kind} backward{name}", call
        yield f"unpack {kind}", launch.unpack(matrix, geometry, x, partial[0], channels, weight, imag)
    yield "affine forward", launch.affine_forward(out, vector, vector, out, True)
    yield "affine backward", launch.affine_backward(out, vector, vector, out, out, True)[0]


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int64: "*i64",
}


def compile_call(call, arch: int):
    """What Triton's compiler makes of a call on an architecture, with the hints that its launcher would give."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            hints[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value == 1:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    assert set(call.arguments) == set(signature), set(call.arguments) ^ set(signature)
    source = ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": call.num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, arch: int) -> dict[str, int]:
    """Registers per thread, bytes spilled, bytes of shared memory, and tensor core instructions by kind."""
    from triton import knobs

    assembler = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
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
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "mma": len(re.findall(r"mma\.sync|tcgen05\.mma", compiled.asm["ptx"])),
        "conversions": compiled.asm["ttgir"].count("ttg.convert_layout"),
        "serialized": int("wgmma" in log and "serializ" in log),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--input-dtype", help="of the images; default that of the products")
    parser.add_argument("--stem", nargs="+", default=["resnet"], choices=STEMS)
    parser.add_argument("--layout", nargs="+", default=["channels_last"])
    parser.add_argument("--channels", type=int, nargs="+", default=[64])
    parser.add_argument("--only", default="", help="a part of the kernels' names")
    arguments = parser.parse_args()
    for arch in arguments.arch:
        for dtype in arguments.dtype:
            for stem in arguments.stem:
                for layout in arguments.layout:
                    for n in arguments.channels:
                        kind = getattr(torch, dtype)
                        input_dtype = getattr(torch, arguments.input_dtype) if arguments.input_dtype else kind
                        for name, call in calls(stem, kind, layout, n, input_dtype):
                            if arguments.only not in name:
                                continue
                            where = {"arch": arch, "dtype": dtype, "stem": stem, "layout": layout, "channels": n}
                            found = resources(compile_call(call, arch), arch)
                            print(json.dumps({"kernel": name, **where, **found}), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "unset TRITON_INTERPRET: an interpreter cannot compile"
    sys.exit(main())
