"""mixpool beside other packages' anti-aliased pooling, through their own code: timm, antialiased-cnns, kornia.

    python -m benchmarks.peers              about 15 minutes on 2 quiet cores; writes records/peers.jsonl
    python -m benchmarks.peers --only functions cost stability network

functions   are they the same function, with the same weights, and if not, what differs
cost        CPU time of stems and of whole ResNet-18s, forward and backward, interleaved in one run
stability   change of the stem's output under shifts, the same Gabor filters under every pooling
network     SqueezeNet with its real weights, the pooling of its stem replaced: accuracy, consistency, flips

A package that is not installed gives records that say so. antialiased-cnns is licensed CC BY-NC-SA 4.0: it is measured
where the user has installed it, never a dependency. Into a folder of its own, found by PYTHONPATH:

    pip install --no-deps --target FOLDER antialiased-cnns==0.3 kornia==0.9.0 kornia-rs

What a run finds in the file, measured with the same sources, it does not repeat.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.cost.stem import call_of
from benchmarks.kit import timing
from benchmarks.kit.stems import RESNET, Unavailable, images, stem_parts
from benchmarks.kit.store import NOT_RUN, RECORDS, Store, identity
from benchmarks.peers.stems import (
    CLASSIFIERS,
    EARLIER,
    FUNCTIONS,
    MIXPOOL,
    NETWORKS,
    PACKAGES,
    POOLINGS,
    STEMS,
    Provider,
    _timm,
    is_swapped,
    stem_of,
)
from mixpool import convert, records
from mixpool.conversion.find import find_stem
from mixpool.evaluation.demo import set_gabor_bank
from mixpool.evaluation.photos import IMAGENET_MEAN, IMAGENET_STD, demo_photos, load_images, normalize
from mixpool.evaluation.shifts import BORDER, DIRECTIONS, change_curve, shifted_crop

SIZE, SHIFTS = 224, (1, 2, 4)
ROUNDS = {"forward": {"stem": 41, "resnet18": 15}, "full": {"stem": 15, "resnet18": 9}}
BATCH = 8
NUM_PHOTOS = {"stability": 100, "network": 200, "flips": 100}
Found = Iterator[dict[str, Any]]


def about(kind: str, case: str, provider: str, name: str | None, **fields: Any) -> dict[str, Any]:
    """A stamped record of a provider, with the version of its package."""
    try:
        version = None if name is None else metadata.version(PACKAGES[name])
    except metadata.PackageNotFoundError:
        version = None
    return records.stamp(kind, case=case, provider=provider, package=name, package_version=version, **fields)


def package_of(provider: str) -> str | None:
    return POOLINGS[provider].package if provider in POOLINGS else None


def _tried(store: Store, record: dict[str, Any], call: Callable[[], Any]) -> Found:
    """The record with what a call measures, or why it cannot; nothing if the store has it."""
    if store.has(record):
        return
    try:
        yield record | {"result": call()}
    except Unavailable as reason:
        yield record | {"skipped": f"{NOT_RUN}{reason}"}


# --- the same function? -----------------------------------------------------------------------------------------------


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm layers as those of a trained model: fresh ones multiply whole branches by zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.normal_(1, 0.2, generator=generator)
            norm.bias.normal_(0, 0.2, generator=generator)
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return model


def copy_by_position(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give a model another one's parameters and running statistics, in order; ValueError if the shapes differ."""

    def state(model: nn.Module) -> list[Tensor]:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        return [*model.parameters(), *(t for norm in norms for t in (norm.running_mean, norm.running_var))]

    ours, theirs = state(source), state(target)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ValueError(f"expected the same shapes in the same order, got {len(ours)} and {len(theirs)} tensors")
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    return target


def difference(first: nn.Module, second: nn.Module, sizes: tuple[int, ...], batch: int = 2) -> dict[str, float]:
    """Largest difference of outputs over the first's std, in float64, over images of these sides.

    Returns:
        "evaluation", "training" and "gradient" (of the first parameter, in training), and for feature maps "inside":
        in evaluation, without the border.
    Raises:
        ValueError: the outputs have different shapes.
    """
    found: dict[str, list[float]] = {"evaluation": [], "inside": [], "training": [], "gradient": []}
    first, second = (copy.deepcopy(model).double() for model in (first, second))
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        x = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            here, there = (model.eval()(x) for model in (first, second))
        found["evaluation"].append(_largest(here, there))
        if here.ndim == 4:
            inside = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
            found["inside"].append(_largest(here[inside], there[inside]))
        outputs = [model.train()(x) for model in (first, second)]
        found["training"].append(_largest(*outputs))
        upstream = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
        weights = (next(model.parameters()) for model in (first, second))
        pairs = zip(outputs, weights, strict=True)
        found["gradient"].append(_largest(*(torch.autograd.grad(out, weight, upstream)[0] for out, weight in pairs)))
    return {name: max(values) for name, values in found.items() if values}


@torch.no_grad()
def _largest(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"expected outputs of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return ((a - b).abs().max() / a.std()).item()


def functions(store: Store, sizes: tuple[int, ...] = (224, 195)) -> Found:
    parts = stem_parts(RESNET)
    ours = stem_of("mixpool BlurPool", parts)
    for name in (name for name in POOLINGS if name != "stock"):
        record = about("peer_function", "stem", name, package_of(name), base="mixpool BlurPool")
        yield from _tried(store, record, lambda name=name: difference(ours, stem_of(name, parts), sizes))
    base = randomize(_timm("resnet18", aa_layer=timm.layers.BlurPool2d))
    for name, (build, needed) in FUNCTIONS.items():
        record = about("peer_function", "resnet18", name, needed, base="timm resnet18, aa_layer=BlurPool2d")
        yield from _tried(store, record, lambda b=build: difference(base, copy_by_position(base, b()), sizes))


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(store: Store, batch: int = BATCH, size: int = SIZE, rounds: dict = ROUNDS) -> Found:
    parts = stem_parts(RESNET)
    x = images(RESNET._replace(size=size), batch, "float32")
    builders = {
        "stem": {n: Provider(functools.partial(stem_of, n, parts), package_of(n)) for n in STEMS},
        "resnet18": NETWORKS,
    }
    for mode in ("forward", "full"):
        for case, providers in builders.items():
            fields = {"mode": mode, "dtype": "float32", "layout": "NCHW", "params": {"N": batch, "H": size, "W": size}}
            found = {n: about("peer_speed", case, n, needed, **fields) for n, (_, needed) in providers.items()}
            if all(store.has(record) for record in found.values()):
                continue
            calls = {}
            for name, (build, _) in providers.items():
                try:
                    calls[name] = call_of(build(), x, mode)
                except Unavailable as reason:
                    found[name]["skipped"] = f"{NOT_RUN}{reason}"
            samples = timing.interleave(calls, rounds[mode][case], 1, "cpu")
            for name, record in found.items():
                if name in samples:
                    record["ms"] = timing.milliseconds(samples[name])
                    record["ratio_to_stock"] = timing.ratio(samples[name], samples["stock"])
                yield record


# --- stability of the stem --------------------------------------------------------------------------------------------


def photos_of(case: str) -> Tensor:
    """Normalised photos with a margin for the shifts, (N, 3, ..., ...)."""
    side = SIZE + 2 * max(SHIFTS)
    if case == "scikit-image":
        return normalize(demo_photos(side)[1])
    from benchmarks.kit.sample import shared_folder

    try:
        folder = shared_folder()
    except SystemExit as error:
        raise Unavailable(str(error)) from error
    found = load_images(folder / "data/imagenet_sample/val", side, NUM_PHOTOS["stability"], crop_ratio=side / 256)
    return normalize(found.images, IMAGENET_MEAN, IMAGENET_STD)


def gabor_parts(photos: Tensor, size: int = SIZE) -> tuple:
    """ResNet-18's stem with a Gabor bank, and in its norm layer the statistics of photos."""
    model = _timm("resnet18").eval()
    found = find_stem(model)
    set_gabor_bank(found, shifted_crop(photos, size, 0))
    return model.conv1, model.bn1, model.act1, model.maxpool


def changes(stem: nn.Module, photos: Tensor, swapped: list[bool], size: int = SIZE) -> dict[str, Any]:
    """Mean change over all channels, and over those that mixpool swaps, by direction and shift in pixels."""
    chosen = torch.tensor(swapped)
    stem.eval()

    def batched(x: Tensor) -> Tensor:
        return torch.cat([stem(part) for part in x.split(16)])

    found: dict[str, Any] = {"all": {}, "swapped": {}}
    for direction in DIRECTIONS:
        curve = change_curve(batched, photos, size, SHIFTS, direction)
        for name, part in (("all", curve), ("swapped", curve[:, chosen])):
            means = part.nanmean(dim=1).tolist()
            found[name][direction] = {str(shift): mean for shift, mean in zip(SHIFTS, means, strict=True)}
    return found


def stability(store: Store) -> Found:
    for case in ("scikit-image", "imagenet_sample"):
        try:
            yield from _stability_on(case, photos_of(case), store)
        except Unavailable as reason:
            yield about("peer_stability", case, "stock", None, skipped=f"{NOT_RUN}{reason}")


def _stability_on(case: str, photos: Tensor, store: Store) -> Found:
    parts = gabor_parts(photos)
    swapped = is_swapped(parts)
    fields = {"num_images": len(photos), "num_modulus": sum(swapped), "channels": len(swapped)}
    for name in STEMS:
        record = about("peer_stability", case, name, package_of(name), **fields)
        yield from _tried(store, record, lambda name=name: changes(stem_of(name, parts), photos, swapped))


# --- a whole network with real weights --------------------------------------------------------------------------------


def squeezenet_with(provider: str, model: nn.Module, calibration: Tensor) -> int:
    """Put a provider's pooling into SqueezeNet's stem, in place; the number of complex channels."""
    if provider in POOLINGS:
        model.features[2] = POOLINGS[provider].build(model.features[0].out_channels, model.features[2])
        return 0
    options = dict(MIXPOOL[provider])
    if options["select"] == "chosen":
        # By its own measure, without a mean, no channel of this network would follow its max pooling closely enough.
        options["select"] = list(convert(copy.deepcopy(model), images=calibration).plan.is_complex)
    return convert(model, **options, images=None if options["select"] == "none" else calibration).num_complex


def network(store: Store) -> Found:
    from benchmarks.kit.sample import split, squeezenet
    from benchmarks.pretrained.evaluation import INPUT, photos, prepared
    from mixpool.evaluation.evaluate import evaluate
    from mixpool.evaluation.result import difference_record

    case = "squeezenet1_0"
    try:
        given = photos()
    except SystemExit as error:
        yield about("peer_network", case, "stock", None, skipped=f"{NOT_RUN}{error}")
        return
    first, others = split(seed=0)
    given.indices = first.tolist()
    calibration = prepared(given)
    # Flips look at 25 crops of each photo, the two others at 3.
    passes = {("accuracy", "consistency"): NUM_PHOTOS["network"], ("flips",): NUM_PHOTOS["flips"]}

    def measured(provider: str) -> tuple[int, list]:
        model = squeezenet()
        num_modulus = squeezenet_with(provider, model, calibration)
        results = []
        for protocols, count in passes.items():
            given.indices = others[:count].tolist()
            results.append(evaluate(model, given, protocols=protocols, model_input=INPUT, device="cpu"))
        return num_modulus, results

    stock: list = []

    def result(provider: str) -> dict[str, Any]:
        if not stock:
            stock.extend(measured("stock")[1])
        num_modulus, found = (0, stock) if provider == "stock" else measured(provider)
        merged: dict[str, Any] = {"num_modulus": num_modulus, "summary": {}, "ci95": {}}
        merged["difference"] = {"summary": {}, "ci95": {}}
        for base, evaluation in zip(stock, found, strict=True):
            record, paired = evaluation.as_record(), difference_record(base, evaluation)
            for key in ("summary", "ci95"):
                merged[key] |= record[key]
                merged["difference"][key] |= paired[key]
        return merged

    fields = {"num_images": NUM_PHOTOS["network"], "num_flip_images": NUM_PHOTOS["flips"]}
    fields["calibration_images"] = len(first)
    for name in CLASSIFIERS:
        record = about("peer_network", case, name, package_of(name), **fields)
        yield from _tried(store, record, lambda name=name: result(name))


# --- the run ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Store], Found]] = {f.__name__: f for f in (functions, cost, stability, network)}


def keep(store: Store, record: dict[str, Any]) -> None:
    """Add a record in the place of one of the same; a record that says "not run" replaces no measurement."""

    anywhere = {"code": {}, "machine": {}}
    names = {record["provider"], EARLIER.get(record["provider"])}
    same = [identity(record | anywhere | {"provider": name}) for name in names]

    def is_same(old: dict[str, Any]) -> bool:
        return identity(old | anywhere) in same

    if "skipped" in record and any(is_same(old) and "skipped" not in old for old in store):
        return
    store.drop(is_same)
    store.add(record)


def line_of(record: dict[str, Any]) -> str:
    """One line of progress."""
    shown = record.get("skipped") or record.get("result") or record.get("ratio_to_stock")
    if record["kind"] == "peer_network" and isinstance(shown, dict):
        shown = {key: shown["summary"][key] for key in ("top1", "shift_consistency")}
    mode = f"{record['mode']:8s}" if "mode" in record else ""
    return f"{record['kind']:15s}{record['case']:16s}{mode}{record['provider']:42s}{shown}"


def main(only: Sequence[str] = tuple(PARTS), output: Path = RECORDS / "peers.jsonl") -> None:
    store = Store(output)
    for part in only:
        for record in PARTS[part](store):
            keep(store, record)
            print(line_of(record), flush=True)
