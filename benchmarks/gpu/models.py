"""Whole networks on a GPU: images per second of timm ResNets in training and inference, with five stems.

    stock               as timm builds it
    BlurPool            aa_layer=timm.layers.BlurPool2d: every strided layer antialiased, what timm users take today
    mixpool reference   Gabor filters, every other channel on the modulus
    mixpool fused       the same, backend="fused"
    scratch fused       mixpool_*'s default: 48 wavelets on the fused modulus, the others on the reference's BlurPool

bfloat16 autocast, channels_last, random images and labels that lie on the GPU, SGD with momentum (fused).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.cases import DEFAULT
from benchmarks.gpu.providers import compiled
from benchmarks.kit import timing
from benchmarks.kit.stems import CMOD, MIX, Unavailable, convert_by
from benchmarks.kit.store import NOT_RUN, Store
from benchmarks.kit.timing import Budget, DeviceLost, release, rounded
from mixpool import records

PROVIDERS = ("stock", "mixpool fused", "BlurPool", "mixpool reference", "scratch fused")
ROUNDS, REPEATS = 6, 3
SECONDS = {False: 6.0, True: 45.0}  # expected per provider: eager, compiled


class ModelCase(NamedTuple):
    """A model, a pass ("training" or "inference"), with or without torch.compile."""

    model: str
    mode: str
    is_compiled: bool
    batch: int = 256
    size: int = 224

    def record(self, provider: str, *, dry: bool = False, **fields: Any) -> dict[str, Any]:
        params = {"N": self.batch, "H": self.size, "W": self.size}
        return records.stamp(
            "model_speed",
            case=self.model,
            provider=f"{provider} compiled" if self.is_compiled else provider,
            mode=self.mode,
            dtype="autocast",
            layout="channels_last",
            params=params,
            **({"dry": True} if dry else {}),
            **fields,
        )

    def __str__(self) -> str:
        return f"{self.model} {self.mode} {'compiled' if self.is_compiled else 'eager'} N={self.batch}"


def cases(*, quick: bool = False, dry: bool = False) -> list[ModelCase]:
    """The issue's target (resnet50 in training) first."""
    if dry:
        return [ModelCase("resnet18", "training", True, 2, 20)]
    found = [
        ModelCase(model, mode, is_compiled)
        for model in ("resnet50", "resnet18")
        for mode in ("training", "inference")
        for is_compiled in (False, True)
    ]
    return found[:2] if quick else found


def run_models(store: Store, budget: Budget, device: str, *, quick=False, dry=False, again=False) -> None:
    """Time all providers of a case interleaved; each case's records are written when it is done."""
    for case in cases(quick=quick, dry=dry):
        providers = PROVIDERS[:2] if dry and case.is_compiled else PROVIDERS
        blank = {name: case.record(name, dry=dry) for name in providers}
        if not again and all(store.has(record) for record in blank.values()):
            continue
        expected = SECONDS[case.is_compiled] * len(providers) * (1.3 if case.mode == "training" else 0.7)
        if not budget.allows(expected):
            left = [name for name, record in blank.items() if again or not store.has(record)]
            store.add(*(case.record(name, dry=dry, skipped=NOT_RUN + "out of budget") for name in left))
            print(f"{case}: out of budget", flush=True)
            continue
        refused = {}
        if not again:
            refused = {
                name: found["skipped"] for name, r in blank.items() if "skipped" in (found := store.find(r) or r)
            }
            refused = {name: reason for name, reason in refused.items() if not reason.startswith(NOT_RUN)}
        with budget.spending(expected):
            store.add(*timed(case, providers, refused, store, budget, device, dry=dry))


def timed(
    case: ModelCase, providers, refused: dict[str, str], store: Store, budget: Budget, device: str, *, dry: bool
) -> list[dict]:
    """The records of one case."""
    calls: dict[str, Callable[[], object]] = {}
    reasons = dict(refused)
    release()
    for name in providers:
        if name in reasons:
            continue
        if not budget.allows(SECONDS[case.is_compiled]):
            reasons[name] = NOT_RUN + "out of budget"
            continue
        try:
            calls[name] = build(case, name, device, dry=dry)
        except Unavailable as error:
            reasons[name] = str(error)
        except DeviceLost as error:
            store.add(case.record(name, dry=dry, skipped=timing.reason_of(error)))
            raise
    try:
        samples = timing.interleave(calls, 1 if dry else ROUNDS, 1 if dry else REPEATS, device)
    except Exception as error:
        lost = isinstance(error, DeviceLost)
        blamed = [name for name in calls if not lost or "fused" in name] or list(calls)
        reason = f"while timing: {timing.reason_of(error)}"
        store.add(*(case.record(name, dry=dry, skipped=reason) for name in blamed))
        if lost:
            raise
        return []
    found = []
    for name in providers:
        if name in reasons:
            found.append(case.record(name, dry=dry, skipped=reasons[name]))
            print(f"{case}: {name:20s} skipped: {reasons[name]}", flush=True)
            continue
        ms = timing.milliseconds(samples[name])
        fields: dict[str, Any] = {"ms": rounded(ms), "images_per_s": round(case.batch / ms["p50"] * 1e3, 1)}
        if "stock" in samples:
            fields["ratio_to_stock"] = rounded(timing.ratio(samples[name], samples["stock"]))
        found.append(case.record(name, dry=dry, **fields))
        print(f"{case}: {name:20s} {ms['p50']:8.2f} ms  {fields['images_per_s']:7.0f} images/s", flush=True)
    return found


def build(case: ModelCase, provider: str, device: str, *, dry: bool) -> Callable[[], object]:
    """One step of a provider, run a few times; Unavailable with the reason if it cannot run."""
    made: list[Callable[[], object]] = []

    def prepare() -> None:
        torch.manual_seed(0)
        model = model_of(case.model, provider, dry=dry).to(device, memory_format=torch.channels_last)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(case.batch, 3, case.size, case.size, generator=generator, device=device)
        x = x.to(memory_format=torch.channels_last)
        labels = torch.randint(10, (case.batch,), generator=generator, device=device)
        run = compiled(model, DEFAULT if case.is_compiled else None, dry)
        make = training_step if case.mode == "training" else inference_step
        made.append(make(model, run, x, labels, device))
        for _ in range(case.is_compiled if dry else 4):
            made[0]()

    reason = timing.attempt(prepare, device)
    if reason is not None:
        raise Unavailable(reason)
    return made[0]


def model_of(name: str, provider: str, *, dry: bool = False) -> nn.Module:
    """A timm model with the provider's stem; small in a dry run."""
    import timm
    from timm.layers import BlurPool2d

    import mixpool.timm_models  # noqa: F401  registers mixpool_*

    options: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 10} if dry else {}
    if provider == "BlurPool":
        return timm.create_model(name, aa_layer=BlurPool2d, **options)
    if provider == "scratch fused":
        return timm.create_model(f"mixpool_{name}", backend="fused", **options)
    model = timm.create_model(name, **options)
    if provider == "stock":
        return model
    return convert_by(CMOD if dry else MIX, model, provider.removeprefix("mixpool "))


def training_step(model: nn.Module, run: Callable, x: Tensor, labels: Tensor, device: str) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()

    return step


def inference_step(model: nn.Module, run: Callable, x: Tensor, labels: Tensor, device: str) -> Callable[[], object]:
    model.eval()

    @torch.inference_mode()
    def step() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return run(x)

    return step
