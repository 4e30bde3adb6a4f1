"""Which kernel with which arguments: from tensors to calls. A call is a value, so that tests can compile it instead."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixpool.ops.fused import centers, moments, packing, windows, windows_backward
from mixpool.ops.fused.blocks import SMALLEST_SHARED_MEMORY, Blocks, blocks_for
from mixpool.ops.fused.geometry import COLUMNS, StemGeometry


class Call(NamedTuple):
    """A kernel with its grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4

    def __call__(self) -> None:
        # STAGES of the loops are constants of their own: num_stages is for loops that do not name any
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=1)


class Matrix(NamedTuple):
    """The filters of a kind as `packing` lays them out: sizes that pack, the kernels and unpack share."""

    kind: str
    blocks: Blocks
    n_channels: int
    groups: int
    depth: int  # padded

    @classmethod
    def of(
        cls,
        kind: str,
        geometry: StemGeometry,
        n_channels: int,
        dtype: torch.dtype,
        purpose: str,
        shared_memory: int | None = None,
    ) -> Matrix:
        """`purpose` is one of "inference", "training" (forward) and "backward"; bytes are the device's if not given."""
        limit = shared_memory_of_device() if shared_memory is None else shared_memory
        depth = geometry.depth(kind)
        return cls.cut(kind, blocks_for(kind, purpose, n_channels, depth, dtype.itemsize, limit), n_channels, depth)

    @classmethod
    def cut(cls, kind: str, blocks: Blocks, n_channels: int, depth: int) -> Matrix:
        """With given blocks; the depth is padded to whole chunks of slices (1 slice each in forward passes)."""
        step = blocks.slice * blocks.chunk
        return cls(kind, blocks, n_channels, -(-n_channels // blocks.group), -(-depth // step) * step)

    @property
    def columns(self) -> int:
        return COLUMNS[self.kind] * self.blocks.group

    @property
    def slices(self) -> int:
        return self.depth // self.blocks.slice

    def constants(self) -> dict[str, Any]:
        return {
            "KIND": self.kind,
            "GROUP": self.blocks.group,
            "N_COLUMNS": self.columns,
            "DEPTH": self.depth,
            "BLOCK_K": self.blocks.slice,
        }


def shared_memory_of_device() -> int:
    """Bytes of shared memory that a program can have on the current GPU; the least of all where there is none."""
    if not torch.cuda.is_available():
        return SMALLEST_SHARED_MEMORY
    return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; 2 where there is none (the interpreter, compilation without a device)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def strides(prefix: str, tensor: Tensor, axes: str = "NCHW") -> dict[str, int]:
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies; float32 reaches a kernel only where TF32 is allowed."""
    return "tf32" if dtype == torch.float32 else "ieee"


def pack(matrix: Matrix, geometry: StemGeometry, x: Tensor, weight, weight_imag, channels, packed: Tensor) -> Call:
    imag = weight if weight_imag is None else weight_imag
    real_strides, imag_strides = (strides(name, w, "oihw") for name, w in (("real", weight), ("imag", imag)))
    arguments = {
        "real": weight,
        "imag": imag,
        "channels": channels,
        "packed": packed,
        "n": matrix.n_channels,
        **real_strides,
        **imag_strides,
        **_filter_constants(matrix, geometry, x),
    }
    return Call(packing.pack, (matrix.slices, matrix.groups), arguments)


def unpack(matrix: Matrix, geometry: StemGeometry, x: Tensor, packed: Tensor, channels, real: Tensor, imag) -> Call:
    arguments = {
        "packed": packed,
        "channels": channels,
        "real": real,
        "imag": real if imag is None else imag,
        "n": matrix.n_channels,
        **_filter_constants(matrix, geometry, x),
        "BLOCK": power_of_2(geometry.in_channels * geometry.kernel_size**2),
    }
    return Call(packing.unpack, (matrix.n_channels,), arguments)


def _filter_constants(matrix: Matrix, geometry: StemGeometry, x: Tensor) -> dict[str, Any]:
    return {
        **matrix.constants(),
        "KERNEL": geometry.kernel_size,
        "TAPS": geometry.num_taps(matrix.kind),
        "LEAD": geometry.window_start()[1],
        "STRIDE": geometry.stride,
        "C_IN": geometry.in_channels,
        "CHANNELS_LAST": x.stride(3) != 1,  # as `load_patch` decides
    }


class Walk(NamedTuple):
    """How `windows` covers the map: the cells it visits, its tiles of columns and strips of rows."""

    first: int
    end_p: int
    cells_q: int
    n_columns: int
    tiles: int
    strips: int

    @classmethod
    def of(cls, geometry: StemGeometry, blocks: Blocks, n_images: int, everywhere: bool) -> Walk:
        """`everywhere` includes cells of the map that no window covers."""
        end_p, end_q = geometry.cells_end if everywhere else geometry.pooled_size
        first = geometry.first_cell
        first_p = first if everywhere else 0
        n_columns = n_images * (end_q - first)
        tiles = -(-n_columns // (blocks.rows - 1))
        return cls(first_p, end_p, end_q - first, n_columns, tiles, -(-(end_p - first_p) // blocks.strip))

    def constants(self, geometry: StemGeometry, blocks: Blocks) -> dict[str, int]:
        return {
            "FIRST_P": self.first,
            "END_P": self.end_p,
            "FIRST_Q": geometry.first_cell,
            "CELLS_Q": self.cells_q,
            "BLOCK": blocks.rows,
            "STRIP": blocks.strip,
        }


def forward(
    matrix: Matrix,
    geometry: StemGeometry,
    x: Tensor,
    packed: Tensor,
    channels: Tensor,
    out: Tensor,
    *,
    argmax: Tensor | None = None,
    pivot: Tensor | None = None,
    with_sums: bool = False,
) -> tuple[Call, Tensor | None]:
    """The call that fills `out` (and `argmax`) at `channels`, and the sums it will fill, (programs, 2, width).

    `pivot` is (C_out,); for the kind "max" sums are taken about it.
    """
    blocks, kind, n_images = matrix.blocks, matrix.kind, x.shape[0]
    width = matrix.groups * blocks.group
    arguments = {
        "x": x,
        "packed": packed,
        "channels": channels,
        "out": out,
        "n_channels": matrix.n_channels,
        **strides("X", x),
        **strides("OUT", out),
        **matrix.constants(),
        **_geometry_constants(geometry, kind),
        "GROUPS": matrix.groups,
        "EVEN": matrix.n_channels % blocks.group == 0,
        "IDENTITY": matrix.n_channels == out.shape[1],
        "BLOCK": blocks.rows,
        "WITH_SUMS": with_sums,
        "PRECISION": precision(packed.dtype),
        "STAGES": blocks.stages,
    }

    def sums_of(programs: int) -> Tensor | None:
        return x.new_empty((programs, 2, width), dtype=torch.float64) if with_sums else None

    if kind == "modulus1":
        n_positions = n_images * out.shape[2] * out.shape[3]
        programs = min(3 * multiprocessors(x.device), -(-n_positions // blocks.rows))
        sums = sums_of(programs)
        arguments |= {"n_positions": n_positions, "sums": x if sums is None else sums}
        return Call(centers.forward, (programs, matrix.groups), arguments, blocks.num_warps), sums

    walk = Walk.of(geometry, blocks, n_images, everywhere=with_sums)
    sums = sums_of(walk.tiles * walk.strips)
    places = x if argmax is None else argmax
    arguments |= {
        "argmax": places,
        "pivot": x if pivot is None else pivot,
        "sums": x if sums is None else sums,
        "n_columns": walk.n_columns,
        **strides("ARGMAX", places),
        **walk.constants(geometry, blocks),
        "WITH_ARGMAX": argmax is not None,
    }
    return Call(windows.forward, (walk.tiles * matrix.groups, walk.strips), arguments, blocks.num_warps), sums


def finish_moments(kind: str, sums: Tensor, channels: Tensor, pivot: Tensor | None, out: Tensor, count: int) -> Call:
    """Writes `out`, (2, C_out), at `channels`; `pivot` is what the sums of the kind "max" were taken about."""
    arguments = {
        "sums": sums,
        "channels": channels,
        "pivot": sums if pivot is None else pivot,
        "moments": out,
        "n_programs": sums.shape[0],
        "width": sums.shape[2],
        "n_out_channels": out.shape[1],
        "count": count,
        "KIND": kind,
        "BLOCK": 256,
    }
    return Call(moments.finish, (len(channels),), arguments)


def spread_moments(
    matrix: Matrix, moments_: Tensor, grad_moments: Tensor, channels: Tensor, count: int
) -> tuple[Call, Tensor]:
    """The call that fills the coefficients of `backward`, (2, groups * columns), and those."""
    coefficients = moments_.new_empty((2, matrix.groups * matrix.columns))
    arguments = {
        "moments": moments_,
        "grad_moments": grad_moments,
        "channels": channels,
        "coefficients": coefficients,
        "n_channels": matrix.n_channels,
        "n_out_channels": moments_.shape[1],
        "inverse_count": 1.0 / count,
        "KIND": matrix.kind,
        "GROUP": matrix.blocks.group,
        "N_COLUMNS": matrix.columns,
    }
    return Call(moments.spread, (matrix.groups,), arguments), coefficients


def backward(
    matrix: Matrix,
    geometry: StemGeometry,
    x: Tensor,
    packed: Tensor,
    channels: Tensor,
    grad_out: Tensor,
    *,
    argmax: Tensor | None = None,
    coefficients: Tensor | None = None,
    grad_conv: Tensor | None = None,
    with_weight: bool = True,
) -> tuple[Call, Tensor | None]:
    """The call that fills `grad_conv`, and partial sums of the gradient of the matrix, which it returns too."""
    blocks, kind, n_images = matrix.blocks, matrix.kind, x.shape[0]
    if argmax is not None and argmax.shape[1] < matrix.groups * blocks.group:
        raise ValueError(f"expected places of {matrix.groups * blocks.group} channels, got {argmax.shape[1]}")
    chunks = matrix.slices // blocks.chunk if with_weight else 1
    if kind == "modulus1":
        n_positions = n_images * grad_out.shape[2] * grad_out.shape[3]
        n_items = -(-n_positions // blocks.rows)
        own = {"n_positions": n_positions}
    else:
        walk = Walk.of(geometry, blocks, n_images, everywhere=True)
        n_items = walk.tiles * walk.strips
        own = {
            "argmax": x if argmax is None else argmax,
            "n_columns": walk.n_columns,
            "n_items": n_items,
            **strides("ARGMAX", x if argmax is None else argmax),
            **walk.constants(geometry, blocks),
        }
    programs = min(max(2 * multiprocessors(x.device) // (matrix.groups * chunks), 1), n_items)
    partial = None
    if with_weight:
        size = (programs, matrix.groups, matrix.slices, matrix.columns, blocks.slice)
        partial = x.new_empty(size, dtype=torch.float32)
    arguments = {
        "x": x,
        "packed": packed,
        "channels": channels,
        "grad_out": grad_out,
        "coefficients": x if coefficients is None else coefficients,
        "grad_conv": x if grad_conv is None else grad_conv,
        "grad_packed": x if partial is None else partial,
        "n_channels": matrix.n_channels,
        **own,
        **strides("X", x),
        **strides("OUT", grad_out),
        **strides("CONV", x if grad_conv is None else grad_conv, "NCYX"),
        **matrix.constants(),
        **_geometry_constants(geometry, kind),
        "GROUPS": matrix.groups,
        "CHUNK": blocks.chunk,
        "BLOCK": blocks.rows,
        "WITH_SUMS": coefficients is not None,
        "WITH_CONV": grad_conv is not None,
        "WITH_WEIGHT": with_weight,
        "PRECISION": precision(packed.dtype),
        "STAGES": blocks.stages,
    }
    kernel = centers.backward if kind == "modulus1" else windows_backward.backward
    return Call(kernel, (programs, matrix.groups, chunks), arguments, blocks.num_warps), partial


def _geometry_constants(geometry: StemGeometry, kind: str) -> dict[str, int]:
    constants = geometry.constants(kind)
    if kind == "modulus1":
        constants = {name: value for name, value in constants.items() if name not in ("CONV_H", "CONV_W")}
    return constants


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than n."""
    return 1 << (n - 1).bit_length()
