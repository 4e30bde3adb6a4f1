"""The window's binomial mean on a CPU: two average pools against the depthwise convolution that the reference takes.

    python -m benchmarks.cost.lowpass         a minute; writes records/lowpass.jsonl

[1 2 1] x [1 2 1] at stride 2 is an average pool of 2 at stride 1 and one of 2 at stride 2; both are scaled up at the
border. On the moduli of ResNet's stem, 48 channels of 112 x 112, batch 4, float32, one thread; times are those of the
process, so that other work on the machine counts for little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kit import command, timing
from benchmarks.kit.store import RECORDS
from mixpool import records
from mixpool.ops.geometry import PoolGeometry
from mixpool.ops.reference import lowpass_pool

POOL = PoolGeometry((3, 3), (2, 2), (1, 1))
SHAPE = (4, 48, 112, 112)
ROUNDS = 21
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def by_average_pools(values: Tensor) -> Tensor:
    def sums(values: Tensor) -> Tensor:
        return F.avg_pool2d(F.avg_pool2d(values, 2, 1, 1), 2, 2)

    return sums(values) / sums(torch.ones_like(values[:1, :1]))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "depthwise convolution": lambda values: lowpass_pool(values, POOL),
    "two average pools": by_average_pools,
}


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(layout: str, shape: tuple[int, ...] = SHAPE, rounds: int = ROUNDS) -> list[dict]:
    """A record for each way: both passes, and their ratio to the convolution's within each round."""
    values = torch.rand(shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    samples: dict[str, dict[str, list[list[float]]]] = {way: {"forward": [], "backward": []} for way in WAYS}
    for _ in range(rounds + 1):  # the first one warms up
        for way, function in WAYS.items():
            with torch.no_grad():
                samples[way]["forward"].append([1e3 * seconds(lambda f=function: f(values))])
            out = function(values)
            upstream = torch.ones_like(out)
            samples[way]["backward"].append(
                [1e3 * seconds(lambda o=out, u=upstream: torch.autograd.grad(o, values, u))]
            )
    found = []
    for way, passes in samples.items():
        base = samples["depthwise convolution"]
        ratios = {name: timing.rounded(timing.ratio(times[1:], base[name][1:])) for name, times in passes.items()}
        ms = {name: timing.rounded(timing.milliseconds(times[1:])) for name, times in passes.items()}
        found.append(
            records.stamp("lowpass", provider=way, layout=layout, params={"shape": shape}, ms=ms, ratio=ratios)
        )
    return found


def main(path: Path = RECORDS / "lowpass.jsonl") -> None:
    records.code()
    torch.set_num_threads(1)
    found = [record for layout in LAYOUTS for record in measure(layout)]
    records.write(path, found)
    for record in found:
        print(record["layout"], record["provider"], record["ms"]["forward"]["p50"], record["ms"]["backward"]["p50"])


if __name__ == "__main__":
    command.of_folder("benchmarks.cost.lowpass")
    command.run(main, __doc__)
