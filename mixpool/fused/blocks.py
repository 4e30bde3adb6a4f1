"""How a kernel is cut into programs: a small table, chosen by register and shared memory use, not yet by times.

Every entry compiles without spills for sm_90 on the stems of ResNet (7x7/2) and AlexNet (11x11/4) in bfloat16 and
float16; tests/test_fused_compile.py holds it to that.
"""

from __future__ import annotations

from typing import NamedTuple

from mixpool.fused.geometry import COLUMNS

# Bytes of filters that a program keeps in shared memory: what is left of 99 KB (sm_86, sm_89) beside the pixels.
FILTER_BYTES = 88 * 1024


class Blocks(NamedTuple):
    """Tile sizes of a kernel."""

    group: int  # channels of a program, a power of 2
    rows: int  # positions (or columns of cells) of a tile
    slice: int  # elements of a patch per matrix product
    num_warps: int
    chunk: int = 4  # slices that one program of a backward pass sums up
    strip: int = 14  # cells that a program walks down
    stages: int = 1  # buffers of pixels: 2 load the next ones while the present ones are multiplied


INFERENCE = {
    "max": Blocks(64, 64, 32, 8),
    "modulus1": Blocks(64, 64, 64, 4),
    "modulus3": Blocks(32, 64, 32, 4),
}
TRAINING = {  # the forward pass with places of maxima or with sums
    "max": Blocks(32, 64, 32, 8),
    "modulus1": Blocks(64, 64, 64, 4),
    "modulus3": Blocks(32, 64, 32, 8),
}
BACKWARD = {
    "max": Blocks(32, 64, 64, 8),
    "modulus1": Blocks(32, 128, 64, 8),
    "modulus3": Blocks(16, 64, 64, 8),
}
TABLES = {"inference": INFERENCE, "training": TRAINING, "backward": BACKWARD}


def blocks_for(kind: str, purpose: str, n_channels: int, depth: int, itemsize: int) -> Blocks:
    """The table's entry, its group cut to the channels there are and to the filters that fit into shared memory."""
    blocks = TABLES[purpose][kind]
    # 64 columns make the gradient of the matrix a product that the tensor core takes whole (wgmma)
    smallest = (64 if purpose == "backward" else 32) // COLUMNS[kind]
    group = blocks.group
    while group > smallest and (group // 2 >= n_channels or depth * COLUMNS[kind] * group * itemsize > FILTER_BYTES):
        group //= 2
    size = blocks.slice
    while size > 32 and -(-depth // size) * size > 1.15 * depth:
        size //= 2  # less is padding
    slices = -(-depth // size)
    chunks = -(-slices // blocks.chunk)
    return blocks._replace(group=group, slice=size, chunk=-(-slices // chunks))
