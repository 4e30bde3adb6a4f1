"""`evaluate`: any classifier through the protocols on a dataset, loading and the model at work side by side."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mixpool import records
from mixpool.evaluation.dataset import Failure, Images, Stream, check_classes
from mixpool.evaluation.loader import Batch, batches
from mixpool.evaluation.model_input import ModelInput, find_model_input
from mixpool.evaluation.protocols import NEED_LABELS, PROTOCOLS, Place, Protocol, margin
from mixpool.evaluation.result import Evaluation, Speed
from mixpool.evaluation.runner import Runner, are_finite, are_logits, at_work
from mixpool.evaluation.stem_change import MAX_IMAGES, StemFrames, changes_at_all, find_stem_of

DEFAULT = ("accuracy", "consistency", "circular", "flips", "kl", "stem")
NAMES = (*PROTOCOLS, "stem")
CPU_BATCH, GPU_BATCH = 16, 256  # on 2 CPU cores, batches of 16 were the fastest of 8 to 64 (their maps stay in cache)
MAX_WORKERS = 8


def evaluate(
    model: nn.Module,
    images: Images | Stream | Any,
    *,
    protocols: Sequence[str] = DEFAULT,
    model_input: ModelInput | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    amp: torch.dtype | None = None,
    channels_last: bool | None = None,
    seed: int = 0,
    on_error: str = "raise",
    track: Callable[[Iterable, int | None], Iterable] = lambda steps, total: steps,
) -> Evaluation:
    """Accuracy, and steadiness under shifts, of a classifier; `mixpool.evaluation.protocols` defines what is measured.

    The loader's workers decode and resize; the crops are cut and normalised on the device, and each goes through the
    model once, `batch_size` images at a time. The model comes back as it was: modes, device and parameters.

    Args:
        model: from images (N, 3, size, size) to logits (N, classes), from timm, torchvision or elsewhere; compiled and
            wrapped ones too.
        images: of `open_images`, or any dataset of (PIL image, class number).
        protocols: names out of `NAMES`; "stem" is the change of the stem's output on the frames of "flips".
        model_input: what the model wants for its input; default what `find_model_input` finds out.
        batch_size: images per batch; default 16 on a CPU and 256 on a GPU.
        workers: processes that load images; 0: none, loading and the model take turns; default one on a small CPU, up
            to 8.
        device: where to run; default where the model's parameters are.
        amp: autocast to this dtype, torch.bfloat16 or torch.float16; default none.
        channels_last: the memory format of the input; default True on a CPU and with `amp` (there it is faster).
        seed: of the random shifts, not negative.
        on_error: "raise" or "skip" images that cannot be read or cropped, or on which the model's output is not finite
            (a logit of -inf, by which a model excludes a class, is fine); what is skipped is listed in `failed`.
        track: wraps the loop over batches, (iterable, total or None), for a progress bar.
    Returns:
        Evaluation; its `summary()` and `as_record()` have the numbers.
    Raises:
        ValueError: an argument does not fit, there is no such device, the labels cannot be the model's classes, or an
            image cannot be used (with on_error="raise"; with "skip", none can).
    Example:
        >>> import torchvision
        >>> from mixpool.evaluation.evaluate import evaluate
        >>> data = torchvision.datasets.FakeData(4, (3, 64, 64), 10)
        >>> net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))
        >>> evaluate(net, data, protocols=["circular"], workers=0).num_images
        4
    """
    _check(protocols, on_error, seed, batch_size, workers)
    if not isinstance(images, (Images, Stream)):
        images = Images(images)
    if images.left_out and on_error == "raise":
        raise _unreadable(images.left_out, images.origin)
    wanted = find_model_input(model) if model_input is None else model_input
    plan: dict[str, Protocol | StemFrames] = {
        name: StemFrames(wanted.size) if name == "stem" else PROTOCOLS[name](wanted)
        for name in dict.fromkeys(protocols)
    }
    records.code()  # that of the start, for `as_record`
    with at_work(model, device) as where:
        runner = Runner(model, wanted, where, amp, channels_last)
        num_classes = runner.probe()
        notes, stem = [], None
        if set(NEED_LABELS) & set(plan):
            check_classes(images, num_classes)
            if images.num_classes is None:
                notes.append("the dataset does not say its classes: that they are the model's was not checked")
        if "stem" in plan:
            stem, note = find_stem_of(model)
            notes.append(note)
            if stem is None:
                del plan["stem"]
        if not plan:
            raise ValueError(f"nothing to measure: {notes[-1]}")
        batch_size = batch_size or (CPU_BATCH if where.type == "cpu" else GPU_BATCH)
        workers = _default_workers(where) if workers is None else workers
        views = list(dict.fromkeys(protocol.view for protocol in plan.values()))
        loader = batches(images, views, batch_size, workers, pin_memory=where.type == "cuda")
        found = _Found(images.origin, on_error)
        started = arrived = time.perf_counter()
        total = None if isinstance(images, Stream) else len(loader)
        for batch in track(loader, total):
            found.waited += time.perf_counter() - arrived
            found.add_failures(batch.failed)
            if set(NEED_LABELS) & set(plan):
                _check_labels(batch, num_classes)
            if batch.places:
                _measure(found, batch, plan, runner, stem, _stem_step(images), seed)
            arrived = time.perf_counter()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        seconds = time.perf_counter() - started
    if not found.places:
        failures = (*images.left_out, *found.failed)
        if not failures:
            raise ValueError(f"expected images in {images.origin}, found none")
        raise ValueError(f"no image of {images.origin} can be used; {failures[0][0]}: {failures[0][1]}")
    columns = found.columns()
    stem_sums = {name: columns.pop(name) for name in list(columns) if name.startswith("stem_")}
    if stem_sums and not changes_at_all(stem_sums):
        stem_sums = {}
        notes.append("stem change not applicable: every channel of the stem is constant on these images")
        if not columns:
            raise ValueError(f"nothing to measure: {notes[-1]}")
    is_read = not isinstance(images, Stream) or images.limit is None
    num_found = (images.num_found or len(found.places) + len(found.failed)) if is_read else None
    return Evaluation(
        values=columns,
        stem_sums=stem_sums,
        indices=torch.tensor([place.index for place in found.places]),
        checksums=torch.cat(found.checksums),
        failed=(*images.left_out, *found.failed),
        num_found=num_found,
        notes=tuple(notes),
        settings={
            "protocols": list(plan),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(wanted).items()},
            "margin": margin(wanted.size),
            "num_classes": num_classes,
            "seed": seed,
            "batch_size": batch_size,
            "workers": workers,
            "device": str(where),
            "amp": None if amp is None else str(amp).removeprefix("torch."),
            "channels_last": runner.channels_last,
            "on_error": on_error,
        },
        speed=Speed(found.num_frames, seconds, found.waited),
    )


def _measure(
    found: _Found,
    batch: Batch,
    plan: dict[str, Protocol | StemFrames],
    runner: Runner,
    stem: Callable[[Tensor], Tensor] | None,
    stem_step: int,
    seed: int,
) -> None:
    """All protocols on one batch; what any of them cannot use counts for none."""
    views = {view: square.to(runner.where, non_blocking=True) for view, square in batch.views.items()}
    labels = batch.labels.to(runner.where)
    is_bad = torch.zeros(len(labels), dtype=torch.bool)
    measured = []
    for name, protocol in plan.items():
        rows, forward, is_usable = list(range(len(labels))), runner.model, are_logits
        if name == "stem":
            rows = [row for row in rows if batch.places[row].rank % stem_step == 0]
            forward, is_usable = stem, are_finite
        if not rows:
            continue
        squares = views[protocol.view] if len(rows) == len(labels) else views[protocol.view][rows]
        frames = protocol.frames(squares, [batch.places[row] for row in rows], seed)
        bad = torch.zeros(len(rows), dtype=torch.bool, device=runner.where)
        outputs = runner.outputs(forward, frames, is_usable, bad)
        values = protocol.measure(outputs, labels[rows])
        for column in values.values():
            bad |= ~are_finite(column.reshape(len(rows), -1))
        measured.append((rows, values))
        found.num_frames += 0 if name == "stem" else protocol.num_frames * len(rows)
        is_bad[rows] |= bad.cpu()  # not before all frames are through: this waits for the device
        if is_bad.any() and found.on_error == "raise":
            break
    reason = f"the model's output is not finite{runner.advice}"
    found.add_failures([(batch.names[row], reason) for row in is_bad.nonzero()[:, 0].tolist()])
    for rows, values in measured:
        kept = [number for number, row in enumerate(rows) if not is_bad[row]]
        found.add({name: column[kept] for name, column in values.items()})
    kept = (~is_bad).nonzero()[:, 0].tolist()
    found.places += [batch.places[row] for row in kept]
    found.checksums.append(batch.checksums[kept])


def _stem_step(images: Images | Stream) -> int:
    """One of how many images the stem's change is measured on."""
    num_images = images.limit if isinstance(images, Stream) else len(images)
    return math.ceil((num_images or MAX_IMAGES) / MAX_IMAGES)


# --- what comes together ----------------------------------------------------------------------------------------------


class _Found:
    """Results of the batches so far."""

    def __init__(self, origin: str, on_error: str) -> None:
        self.origin, self.on_error = origin, on_error
        self.parts: dict[str, list[Tensor]] = {}
        self.places: list[Place] = []
        self.checksums: list[Tensor] = []
        self.failed: list[Failure] = []
        self.num_frames, self.waited = 0, 0.0  # with those of images that failed: the model saw them

    def add(self, values: dict[str, Tensor]) -> None:
        for name, column in values.items():
            # Sums of the stem are many, and rounded to float32 they lose nothing that counts.
            dtype = torch.float32 if name.startswith("stem_") else torch.float64
            self.parts.setdefault(name, []).append(column.to("cpu", dtype))

    def add_failures(self, failures: Sequence[Failure]) -> None:
        if failures and self.on_error == "raise":
            raise _unreadable(failures, self.origin)
        self.failed += failures

    def columns(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


def _check_labels(batch: Batch, num_classes: int) -> None:
    """Whether the labels are classes of the model."""
    wrong = ((batch.labels < 0) | (batch.labels >= num_classes)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"{batch.names[wrong[0]]} has the label {int(batch.labels[wrong[0]])}, the model has classes 0 to "
            f"{num_classes - 1}; without labels, leave {' and '.join(NEED_LABELS)} out of the protocols"
        )


def _unreadable(failures: Sequence[Failure], origin: str) -> ValueError:
    name, reason = failures[0]
    more = f" (and {len(failures) - 1} more so far)" if len(failures) > 1 else ""
    return ValueError(f"cannot use {name} of {origin}: {reason}{more}; on_error='skip' (--on-error skip) leaves it out")


def _default_workers(where: torch.device) -> int:
    """Enough to keep up: on a CPU the model wants the cores itself, and decoding takes little beside it."""
    cores = os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // 4 if where.type == "cpu" else cores - 1))


def _check(protocols: Sequence[str], on_error: str, seed: int, batch_size: int | None, workers: int | None) -> None:
    unknown = [name for name in protocols if name not in NAMES]
    if unknown or not protocols or isinstance(protocols, str):
        raise ValueError(f"expected protocols out of {', '.join(NAMES)}, got {protocols!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f'expected on_error to be "raise" or "skip", got {on_error!r}')
    if seed < 0 or (batch_size is not None and batch_size < 1) or (workers is not None and workers < 0):
        raise ValueError(f"expected seed >= 0, batch_size >= 1, workers >= 0, got {seed=}, {batch_size=}, {workers=}")
