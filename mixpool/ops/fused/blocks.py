"""How a kernel is cut into programs: a small table, chosen by register and shared memory use, not yet by times.

tests/test_fused_compile.py holds the table to it: on sm_90 no spills but the few it names, on every architecture shared
memory within the limit.

A tile has 16 rows per warp: the compiler lays the warps along the rows of all but the last product of a sum, and with
fewer rows than that, warps multiply the same. The backward pass of "max" has 8 warps for 64 rows nevertheless: with
statistics, 128 rows spill, and so do 64 with 4 warps; without, it has no such product.
"""

from __future__ import annotations

from typing import NamedTuple

from mixpool.ops.fused.geometry import COLUMNS

SMALLEST_SHARED_MEMORY = 99 * 1024  # that a program can have on sm_86, sm_89 and sm_120, in bytes; others have more
LONG_PATCH = 512  # elements; more slices than that makes take registers


class Blocks(NamedTuple):
    """Tile sizes of a kernel."""

    group: int  # channels of a program, a power of 2
    rows: int  # positions (or columns of cells) of a tile
    slice: int  # elements of a patch per matrix product
    num_warps: int
    chunk: int = 1  # slices that one program of a backward pass sums up; 1 in forward passes
    strip: int = 14  # cells that a program walks down
    stages: int = 1  # buffers of pixels: 2 load the next ones while the present ones are multiplied


FORWARD = {
    "max": Blocks(32, 64, 128, 4),
    "modulus1": Blocks(64, 64, 64, 4),
    "modulus3": Blocks(32, 64, 128, 4),
}
BACKWARD = {
    "max": Blocks(32, 64, 64, 8, chunk=4),
    "modulus1": Blocks(32, 128, 64, 8, chunk=4),
    "modulus3": Blocks(16, 128, 64, 8, chunk=4),
}
TRAINING = FORWARD | {"max": Blocks(32, 64, 64, 4)}  # with places of maxima or with sums
TABLES = {"inference": FORWARD, "training": TRAINING, "backward": BACKWARD}
LONG_GROUP = {"max": 16, "modulus1": 32, "modulus3": 16}  # in forward passes over long patches

SMALLER = (("rows", 64), ("group", 32), ("rows", 32), ("group", 16), ("chunk", 1))  # down to; groups in columns


def blocks_for(
    kind: str, purpose: str, n_channels: int, depth: int, itemsize: int, shared_memory: int = SMALLEST_SHARED_MEMORY
) -> Blocks:
    """The table's entry, cut to the channels there are, to the patch, and to the bytes that a program can have."""
    blocks = TABLES[purpose][kind]
    if depth > LONG_PATCH and purpose != "backward":
        blocks = blocks._replace(group=LONG_GROUP[kind])
    # 64 columns make the gradient of the matrix a product that the tensor core takes whole (wgmma)
    smallest = (64 if purpose == "backward" else 32) // COLUMNS[kind]
    while blocks.group > smallest and blocks.group // 2 >= n_channels:
        blocks = blocks._replace(group=blocks.group // 2)
    while blocks.slice > 32 and -(-depth // blocks.slice) * blocks.slice > 1.15 * depth:
        blocks = blocks._replace(slice=blocks.slice // 2)  # less is padding
    slices = -(-depth // blocks.slice)
    blocks = blocks._replace(chunk=-(-slices // -(-slices // blocks.chunk)))
    # Given up first is what costs least: rows that share the filters, columns that share the pixels, then tensor cores.
    for field, least in SMALLER:
        least = least // COLUMNS[kind] if field == "group" else least
        while getattr(blocks, field) > least and shared_bytes(kind, purpose, blocks, depth, itemsize) > shared_memory:
            blocks = blocks._replace(**{field: getattr(blocks, field) // 2})
    return blocks


def shared_bytes(kind: str, purpose: str, blocks: Blocks, depth: int, itemsize: int) -> int:
    """What a program takes of shared memory, at most: filters, pixels that are kept, tiles in transit."""
    columns = COLUMNS[kind] * blocks.group
    slices = -(-depth // (blocks.slice * blocks.chunk)) * blocks.chunk
    kept, transit = 0, blocks.rows * max(blocks.slice, columns)
    if purpose == "backward":
        # Pixels that both products read; TF32 wants them in another order in each.
        kept = blocks.chunk * (2 if itemsize == 4 and blocks.chunk == slices else 1)
        transit *= 2
    if blocks.stages > 1:
        kept += slices * blocks.stages
    barriers = 64
    return (slices * blocks.slice * columns + kept * blocks.rows * blocks.slice + transit) * itemsize + barriers
