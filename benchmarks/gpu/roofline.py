"""The least time of a stem on an H100: bytes that must cross its memory, and products that its filters ask for.

A floor and not a prediction: every input is read once and every output written once at the memory's speed, every
nominal product (no padding of the kernels) is made at the matrix units' speed, and both overlap. Counts per element as
in the design (x input, z pooled output, i1 one byte per pooled maximum):

    inference                     x + z
    training, batch statistics    2 x + 6 z + 2 i1      (pooled sums written and read, output, gradient, norm sums)
    training, no norm             2 x + 2 z + 2 i1

    products of a max channel     the convolution; backward twice more (again and the weights' gradient), without a
                                  norm once more (the argmax is kept, nothing is computed again)
    products of a complex one     two convolutions, at the windows' centres ("cmod") or everywhere; backward twice more
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.kit.stems import Plan, StemShape

BYTES_PER_SECOND = 3.0e12  # a copy on an H100 SXM, bytes read and written
# bfloat16: a matrix product of 8192^3 on random data; the tf32 units are half as wide.
FLOP_PER_SECOND = {"bfloat16": 790e12, "float16": 790e12, "autocast": 790e12, "tf32": 395e12}
BYTES = {"bfloat16": (2, 2), "float16": (2, 2), "autocast": (4, 2), "tf32": (4, 4)}  # of a number of x and of z


class Floor(NamedTuple):
    """What one pass must move and compute; bytes and floating-point operations (a product and a sum are two)."""

    dram_bytes: int
    flops: int
    dram_us: float
    tensor_us: float

    @property
    def us(self) -> float:
        """Microseconds under which no implementation can go."""
        return max(self.dram_us, self.tensor_us)

    def achieved(self, us: float) -> dict[str, float]:
        """GB/s, TFLOP/s and the share of the floor that a measured time, in microseconds, comes to."""
        return {
            "gb_per_s": self.dram_bytes / us / 1e3,
            "tflop_per_s": self.flops / us / 1e6,
            "fraction_of_floor": self.us / us,
        }


def floor_of(shape: StemShape, plan: Plan, batch: int, dtype: str, training: bool) -> Floor:
    """The floor of one forward pass, or of forward and backward for the weights (`training`)."""
    out_height, out_width = shape.pooled_size
    poolings = plan.poolings(shape.out_channels)
    num_max, num_cmod = (poolings.count(name) for name in ("max", "cmod"))
    x_bytes, z_bytes = BYTES[dtype]
    x = batch * shape.in_channels * shape.size**2 * x_bytes
    positions = batch * out_height * out_width
    z, i1 = positions * shape.out_channels * z_bytes, positions * num_max
    if not training:
        dram_bytes = x + z
    elif shape.norm:
        dram_bytes = 2 * x + 6 * z + 2 * i1
    else:
        dram_bytes = 2 * x + 2 * z + 2 * i1
    per_position = 2 * shape.in_channels * shape.kernel_size**2
    everywhere = batch * shape.conv_size[0] * shape.conv_size[1]
    of_max = per_position * everywhere * num_max
    num_others = len(poolings) - num_max - num_cmod
    of_complex = 2 * per_position * (positions * num_cmod + everywhere * num_others)
    if training:
        of_max *= 3 if shape.norm else 2
        of_complex *= 3
    flops = of_max + of_complex
    return Floor(
        dram_bytes, flops, dram_bytes / BYTES_PER_SECOND * 1e6, flops / FLOP_PER_SECOND.get(dtype, 790e12) * 1e6
    )
