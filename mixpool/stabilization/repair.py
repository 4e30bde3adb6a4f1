"""`repair`: the layers behind a change refitted in closed form to what the stock network computes there.

    statistics of the norm layers (statistics.py)  ->  layer by layer, in the order of the data:
    rows of the layer's input in the changed network, and the stock network's output at the same place
        -> ridge regression (ridge.py)  ->  statistics of the norm layers behind  ->  held-out images decide

Whatever does not bring the network closer to the stock one on held-out images is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixpool.stabilization.agreement import disagreement, outputs_on
from mixpool.stabilization.flow import LINEAR, Call, Flow, is_norm, trace
from mixpool.stabilization.lowpass import DenseConv2d, LowPassConv2d
from mixpool.stabilization.pictures import Squares, crops
from mixpool.stabilization.ridge import Ridge, is_plain, num_positions, rows_of, targets_of
from mixpool.stabilization.statistics import correct_statistics, norms_behind, statistics_of

WHICH = ("next", "all", "statistics")
ROWS = 32768  # of a layer's least-squares problem at least; and
ROWS_PER_UNKNOWN = 4
CROPS = 768  # on which a layer is fitted at least, 1 to 8 of each image
STATISTICS_CROPS = 128
TOLERANCE = 1e-6  # of the disagreement, below which it counts as equal

Track = Callable[[Iterable, int | None], Iterable]


@dataclass(frozen=True)
class Repaired:
    """What was done with one layer.

    Attributes:
        name: of the layer; "" for the statistics of all norm layers.
        what: "refitted", "statistics", or "left".
        before, after: disagreement with the stock network on the held-out images.
        why: the reason, if it was left.
    """

    name: str
    what: str
    before: float
    after: float
    why: str = ""


def repair(
    changed: nn.Module,
    stock: nn.Module,
    images: Squares | Tensor,
    *,
    which: str = "next",
    ridge: float = 0.1,
    held_out: Squares | Tensor | None = None,
    seed: int = 0,
    track: Track = lambda steps, total: steps,
) -> list[Repaired]:
    """Bring a changed network closer to the stock one, in place, without labels and without gradients.

    Both have the same modules by name; what has changed is found by the modules' types. Convolutions (groups, dilation,
    stride) and linear layers are refitted; a convolution without bias moves the running mean of the norm behind it.

    Args:
        changed, stock: networks in the same state but for what was changed, on one device, float32 or float64.
        images: normalised images (N, C, H, W), or squares from which crops are cut.
        which: "next": the layers that read a changed map; "all": every linear layer from there on; "statistics": none,
            only the norm layers' running statistics.
        ridge: how strongly the weights are held to what they are, as a share of their inputs' energy.
        held_out: other images, which decide; default an eighth of `images`.
        seed: of the crops and positions.
        track: wraps the loop over layers, (iterable, total), for a progress bar.
    Returns:
        What was done, in the order of the data.
    Raises:
        ValueError: an argument does not fit, or the networks are not the same modules.
    Reference: the module's docstring; Frantar & Alistarh, arXiv 2208.11580.
    """
    if which not in WHICH:
        raise ValueError(f"expected which of {WHICH}, got {which!r}")
    if not ridge > 0:
        raise ValueError(f"expected a positive ridge, got {ridge}")
    names = {name for name, _ in changed.named_modules()}
    places = changed_places(changed, stock)
    fit = images if isinstance(images, Squares) else Squares(images, min(images.shape[-2:]))
    if held_out is None:
        if len(fit.images) < 2:
            raise ValueError(f"expected at least 2 images, got {len(fit.images)}")
        count = max(1, len(fit.images) // 8)
        held_out, fit = fit._replace(images=fit.images[:count]), fit._replace(images=fit.images[count:])
    elif not isinstance(held_out, Squares):
        held_out = Squares(held_out, min(held_out.shape[-2:]))
    modes = [(module, module.training) for net in (changed, stock) for module in net.modules()]
    try:
        changed.eval(), stock.eval()
        with torch.no_grad():
            job = _Repair(changed, stock, fit, held_out, ridge, seed)
            return job.run(places & names, which, track)
    finally:
        for module, mode in modes:
            module.training = mode


def changed_places(changed: nn.Module, stock: nn.Module) -> set[str]:
    """Names of the modules whose types differ, the outermost of them."""
    own, other = dict(changed.named_modules()), dict(stock.named_modules())
    differing = {name for name in own.keys() | other.keys() if type(own.get(name)) is not type(other.get(name))}
    found = {n for n in differing if not any(n.startswith(f"{above}.") for above in differing if above != n)}
    if "" in found:
        raise ValueError(f"expected two networks of one type, got {type(changed).__name__}, {type(stock).__name__}")
    return found


class _Repair:
    def __init__(
        self, changed: nn.Module, stock: nn.Module, fit: Squares, held: Squares, ridge: float, seed: int
    ) -> None:
        self.changed, self.stock, self.fit, self.ridge, self.seed = changed, stock, fit, ridge, seed
        parameter = next(changed.parameters())
        self.place = {"device": parameter.device, "dtype": parameter.dtype}
        self.held = [batch.to(**self.place) for batch in crops(held, 2, seed + 1)]
        self.wanted = outputs_on(stock, self.held)
        rounds = -(-min(STATISTICS_CROPS, 8 * len(fit.images)) // len(fit.images))
        few = [batch.to(**self.place) for batch in crops(fit, rounds, seed + 2, batch=16)]
        self.few = few[: max(1, STATISTICS_CROPS // 16)]
        self.flow: Flow = trace(changed, self.held[0][:1], whole=changed_places(changed, stock))
        self.norms: list[str] = []

    def score(self) -> float:
        return disagreement(outputs_on(self.changed, self.held), self.wanted)

    def run(self, places: Iterable[str], which: str, track: Track) -> list[Repaired]:
        places = [name for name in places if name in self.flow]
        self.norms = [
            name
            for name in norms_behind(self.flow, places)
            if type(self.changed.get_submodule(name)) is type(_submodule(self.stock, name))
        ]
        self.starts = {name: statistics_of(self.stock.get_submodule(name)) for name in self.norms}
        found = []
        score = self.score()
        if self.norms:
            before = {name: statistics_of(self.changed.get_submodule(name)) for name in self.norms}
            correct_statistics(self.changed, self.stock, self.few, self.norms, self.starts)
            after = self.score()
            if after > score + TOLERANCE:
                self._restore(before)
                found.append(Repaired("", "left", score, after, "statistics: further from stock on held-out images"))
                self.norms = []
            else:
                found.append(Repaired("", "statistics", score, after))
                score = after
        if which == "statistics":
            return found
        layers = self.layers(places, which)
        for call in track(layers, len(layers)):
            done, score = self.refit(call, score)
            found.append(done)
        return found

    def layers(self, places: Sequence[str], which: str) -> list[Call]:
        """Linear layers to refit, in order."""
        own = {
            name
            for name in places
            if isinstance(self.changed.get_submodule(name), LowPassConv2d) and _reads_blurred(self.changed, name)
        }
        reads = {call.name for name in set(places) - own for call in self.flow.readers(name)} | own
        wanted = reads if which == "next" else {call.name for call in self.flow.behind(places)} | own
        return [
            call
            for call in self.flow.calls
            if call.name in wanted
            and is_plain(call.module)
            and self.flow.count(call.name) == 1
            and isinstance(_submodule(self.stock, call.name), LINEAR)
        ]

    def refit(self, call: Call, score: float) -> tuple[Repaired, float]:
        layer, twin = call.module, self.stock.get_submodule(call.name)
        norm = self._norm_behind(call)
        statistics = {name: statistics_of(self.changed.get_submodule(name)) for name in self.starts}
        weights = [(p, p.detach().clone()) for p in (layer.weight, layer.bias) if p is not None]
        weight, offset = self._solve(call, layer, twin, with_bias=layer.bias is not None or norm is not None)
        if not torch.isfinite(weight).all():
            return Repaired(call.name, "left", score, score, "its least-squares problem has no finite solution"), score
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(offset)
        if norm is not None:
            self._fit_norm(norm, offset if layer.bias is None else None)
        names = [call.name for call in self.flow.behind([call.name])]
        names = [name for name in self.norms if name in names and name != norm]
        correct_statistics(self.changed, self.stock, self.few, names, self.starts)
        after = self.score()
        if not after <= score + TOLERANCE:
            for parameter, value in weights:
                parameter.copy_(value)
            self._restore(statistics)
            return Repaired(call.name, "left", score, after, "further from stock on held-out images"), score
        return Repaired(call.name, "refitted", score, after), after

    def _fit_norm(self, norm: str, offset: Tensor | None) -> None:
        """The layer in front gives what it gave in the stock network, but for an offset."""
        module = self.changed.get_submodule(norm)
        mean, var = self.starts.get(norm) or statistics_of(self.stock.get_submodule(norm))
        module.running_mean.copy_(mean if offset is None else mean - offset.to(mean))
        module.running_var.copy_(var)

    def _norm_behind(self, call: Call) -> str | None:
        """The norm layer that reads this layer alone, and that nobody else reads."""
        readers = [other for other in self.flow.readers(call.name) if is_norm(other.module)]
        if len(readers) != 1 or readers[0].sources != {call.name: True} or self.flow.count(readers[0].name) != 1:
            return None
        return readers[0].name if readers[0].name in self.starts else None

    def _restore(self, statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (mean, var) in statistics.items():
            module = self.changed.get_submodule(name)
            module.running_mean.copy_(mean)
            module.running_var.copy_(var)

    def _solve(self, call: Call, layer: nn.Module, twin: nn.Module, *, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        count = len(self.fit.images)
        rounds = max(1, min(8, CROPS // count))
        unknowns = layer.weight[0].numel() + with_bias
        total = num_positions(layer, call.out_shape)
        per_image = min(total, max(1, -(-max(ROWS, ROWS_PER_UNKNOWN * unknowns) // (count * rounds))))
        ridge = Ridge(layer, with_bias=with_bias, ridge=self.ridge, num_rows=count * rounds * per_image)
        generator = torch.Generator().manual_seed(self.seed)
        for batch in crops(self.fit, rounds, self.seed):
            batch = batch.to(**self.place)
            positions = torch.randperm(total, generator=generator)[:per_image].to(self.place["device"])
            x = _seen(self.changed, layer, batch, of_input=True)
            wanted = _seen(self.stock, twin, batch, of_input=False)
            ridge.add(rows_of(layer, x, positions), targets_of(layer, wanted, positions))
        return ridge.solve()


class _Reached(Exception):
    pass


def _seen(model: nn.Module, layer: nn.Module, batch: Tensor, *, of_input: bool) -> Tensor:
    """What reaches a layer, or what it gives; the rest of the network is not run."""
    seen: list[Tensor] = []

    def catch(module: nn.Module, args: tuple, *out: Tensor) -> None:
        seen.append(args[0] if of_input else out[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(catch) if of_input else layer.register_forward_hook(catch)
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _reads_blurred(model: nn.Module, name: str) -> bool:
    """Whether the treated convolution itself reads a low-passed map (a dense one does not: its readers do)."""
    return not isinstance(model.get_submodule(name), DenseConv2d)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)
