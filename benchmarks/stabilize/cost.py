"""What a stabilized network costs on this CPU: parameters, FLOPs, memory and time beside stock and beside BlurPool.

    python -m benchmarks.stabilize.cost        about 6 minutes on two quiet cores; writes records/stabilize_cost.jsonl

ResNet-50 and SqueezeNet 1.0 of torchvision, random weights, batch 8 of 224 x 224, evaluation; eager and (two of them)
compiled, NCHW and channels_last, interleaved. "timm aa_layer" is timm's ResNet-50 with BlurPool in the stem and behind
the strided convolutions, which it then computes at every position; timm has no SqueezeNet. Saved are the bytes that a
backward pass would keep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kit import command, timing
from benchmarks.kit.store import RECORDS
from mixpool import records, stabilize

RECORD = RECORDS / "stabilize_cost.jsonl"
BATCH, SIZE, ROUNDS = 8, 224, 9
COMPILED = ("stock", "stabilized")


def variants() -> dict[str, dict[str, nn.Module]]:
    found = {}
    for name in ("resnet50", "squeezenet1_0"):
        torch.manual_seed(0)
        stock = torchvision.models.get_model(name).eval()
        found[name] = {"stock": stock}
        options = {"stabilized": {}, "stem dense": {"stem": "dense"}}
        if name == "resnet50":
            options["behind"] = {"order": "behind"}
        for title, own in options.items():
            found[name][title] = copy.deepcopy(stock)
            stabilize(found[name][title], torch.randn(16, 3, 72, 72), repair=None, **own)
    found["resnet50"]["timm aa_layer"] = timm.create_model("resnet50", aa_layer=timm.layers.BlurPool2d).eval()
    return found


@torch.no_grad()
def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the activations that autograd keeps, without parameters and images."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)  # held, so that no address comes twice
    del out
    return sum(seen.values())


def call_of(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return run(x)

    call()
    return call


def main() -> None:
    timing.keep_heap()
    torch.set_num_threads(2)
    for network, models in variants().items():
        image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        counts = {name: (flops(m, image), saved_bytes(m, image)) for name, m in models.items()}
        for layout in ("NCHW", "channels_last"):
            fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            x = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).contiguous(
                memory_format=fmt
            )
            placed = {name: model.to(memory_format=fmt) for name, model in models.items()}
            for mode in ("eager", "compiled"):
                torch.compiler.reset()
                calls = {
                    name: call_of(m if mode == "eager" else torch.compile(m, dynamic=False), x)
                    for name, m in placed.items()
                    if mode == "eager" or name in COMPILED
                }
                samples = timing.interleave(calls, ROUNDS, 1, "cpu")
                for name in calls:
                    record = records.stamp(
                        "stabilize_cost",
                        network=network,
                        variant=name,
                        mode=mode,
                        layout=layout,
                        params={"N": BATCH, "H": SIZE, "W": SIZE},
                        parameters=sum(p.numel() for p in placed[name].parameters()),
                        flops=counts[name][0],
                        saved_bytes=counts[name][1],
                        ms=timing.rounded(timing.milliseconds(samples[name])),
                        ratio_to_stock=timing.rounded(timing.ratio(samples[name], samples["stock"])),
                    )
                    records.append(RECORD, record)
                    print(network, layout, mode, name, record["ratio_to_stock"]["p50"], flush=True)


if __name__ == "__main__":
    command.run(main, __doc__)
