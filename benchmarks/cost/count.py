"""Parameters, floating-point operations and saved activations: counted, not timed; the same on every machine.

FLOPs are those that `torch.utils.flop_counter` counts: convolutions, those of the blurs among them, and matrix
products, a product and a sum as two. It does not count max pooling, the modulus (4 operations per position), norm
layers, activations, additions and means. What a forward pass computes whatever the batch (mixpool's imaginary filters
from the real ones) stands apart from what it computes for every image.

Activations are the bytes that autograd saves in a forward pass in training, each storage once: of PyTorch's eager mode
on a CPU in float32. The images, the parameters, the buffers and mixpool's maps from real to imaginary filters are
left out, since they are there in any case. A compiled network and the fused path on a GPU save other things
(`benchmarks.gpu` measures these).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost.models import SUBJECTS, build, random_images, variants_of
from benchmarks.kit.store import Store
from mixpool import records
from mixpool.conversion.stock import converted_stems

BATCH, SIZE = 8, 224


def flops(model: nn.Module, size: int = SIZE) -> tuple[int, int]:
    """FLOPs of a forward pass in evaluation: (for every image of `size` x `size` pixels, whatever the batch)."""
    model.eval()
    totals = []
    for batch in (1, 2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(random_images(batch, size))
        totals.append(counter.get_total_flops())
    per_image = totals[1] - totals[0]
    return per_image, totals[0] - per_image


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd saves in model(x) in training, without x and the model's state."""
    model.train()
    maps = [stem.structure().partner_map for stem in converted_stems(model).values()]  # from W to V, no buffers
    kept = (x, *model.parameters(), *model.buffers(), *(tensor for tensor in maps if tensor is not None))
    present = {tensor.untyped_storage().data_ptr() for tensor in kept}
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in present:
            found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(storage.nbytes() for storage in found.values())


def count(subject: str, variant: str, batch: int = BATCH, size: int = SIZE) -> dict[str, Any]:
    """The record of one network or stem."""
    model = build(subject, variant)
    per_image, per_call = flops(model, size)
    saved = saved_bytes(model, random_images(batch, size))
    return _blank(
        subject,
        variant,
        batch,
        size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops_per_image=per_image,
        flops_per_call=per_call,
        saved_bytes=saved,
    )


def _blank(subject: str, variant: str, batch: int, size: int, **fields: Any) -> dict[str, Any]:
    params = {"N": batch, "H": size, "W": size}
    return records.stamp("cost_count", case=subject, provider=variant, dtype="float32", params=params, **fields)


def run_count(
    store: Store, *, again: bool = False, subjects: tuple[str, ...] = SUBJECTS, batch: int = BATCH, size: int = SIZE
) -> None:
    """Count everything that was not counted with this code yet."""
    for subject in subjects:
        for variant in variants_of(subject):
            if not again and store.has(_blank(subject, variant, batch, size)):
                continue
            record = count(subject, variant, batch, size)
            store.drop(lambda old, new=record: _what(old) == _what(new))
            store.add(record)
            print(
                f"{subject:13s} {variant:19s} {record['num_parameters'] / 1e6:7.3f} M parameters, "
                f"{record['flops_per_image'] / 1e9:6.3f} GFLOP and {record['saved_bytes'] / batch / 2**20:6.1f} MiB "
                "saved per image",
                flush=True,
            )


def _what(record: dict) -> tuple:
    return record["kind"], record["case"], record["provider"]
