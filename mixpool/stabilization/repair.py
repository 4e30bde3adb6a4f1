"""`repair`: the layers behind a change refitted in closed form to what the stock network computes there.

    statistics of the norm layers (statistics.py)  ->  layer by layer, in the order of the data:
    rows of the layer's input in the changed network, and the stock network's output at the same place
        -> ridge regression (ridge.py)  ->  statistics of the norm layers behind  ->  held-out images decide

Whatever does not bring the network closer to the stock one on held-out images is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
CROPS = 192  # on which a layer is fitted at least, 1 to 8 of each image
MAX_TARGET_BYTES = 2**29  # of stock outputs that are in memory at a time
STATISTICS_CROPS = 128
ENOUGH_HELD = 32  # images that decide, of which one crop each does
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
    places: Iterable[str] | None = None,
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
        places: names of the changed modules to start from; default all whose types differ.
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
    found = changed_places(changed, stock)
    places = found if places is None else set(places)
    if not places <= found:
        raise ValueError(f"expected places of {sorted(found)}, got {sorted(places - found)}")
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
            return job.run(places, which, track)
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
        self,
        changed: nn.Module,
        stock: nn.Module,
        fit: Squares,
        held: Squares,
        ridge: float,
        seed: int,
    ) -> None:
        self.changed, self.stock, self.fit = changed, stock, fit
        self.ridge, self.seed = ridge, seed
        parameter = next(changed.parameters())
        self.place = {"device": parameter.device, "dtype": parameter.dtype}
        rounds = 1 if len(held.images) >= ENOUGH_HELD else 2
        self.held = [batch.to(**self.place) for batch in crops(held, rounds, seed + 1)]
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
        for call in layers:
            if (why := self.why_not(call)) is not None:
                found.append(Repaired(call.name, "left", score, score, why))
        layers = [call for call in layers if self.why_not(call) is None]
        groups = [group for chunk in self._chunks(layers) for group in self._groups(chunk)]
        for group, problems in track(self._solved(layers), len(groups)):
            for call, problem in zip(group, problems, strict=True):
                done, score = self.refit(call, problem, score)
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
        found: dict[str, Call] = {}
        for call in self.flow.calls:
            if call.name in wanted and isinstance(call.module, LINEAR):
                found.setdefault(call.name, call)
        return list(found.values())

    def why_not(self, call: Call) -> str | None:
        """Why a layer cannot be refitted; None if it can."""
        if not is_plain(call.module) or not isinstance(_submodule(self.stock, call.name), LINEAR):
            return f"a {type(call.module).__name__} has arithmetic of its own"
        count = self.flow.count(call.name)
        return f"it is called {count} times in a pass" if count > 1 else None

    def refit(self, call: Call, problem: Ridge, score: float) -> tuple[Repaired, float]:
        """Give a layer its solution; take it back if held-out images speak against it."""
        layer, norm = call.module, self._norm_behind(call)
        statistics = {name: statistics_of(self.changed.get_submodule(name)) for name in self.starts}
        weights = [(p, p.detach().clone()) for p in (layer.weight, layer.bias) if p is not None]
        weight, offset = problem.solve()
        if not torch.isfinite(weight).all():
            return Repaired(call.name, "left", score, score, "its least-squares problem has no finite solution"), score
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(offset)
        if norm is not None:
            self._fit_norm(norm, offset if layer.bias is None else None)
        behind = {other.name for other in self.flow.behind([call.name])}
        names = [name for name in self.norms if name in behind and name != norm]
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

    # --- rows and targets, for several layers in a pass ---------------------------------------------------------------

    def _solved(self, layers: Sequence[Call]) -> Iterator[tuple[list[Call], list[Ridge]]]:
        """Layers that do not read one another, with their problems; each group after the one before is refitted."""
        for chunk in self._chunks(layers):
            targets: dict[str, list[Tensor]] = {call.name: [] for call in chunk}
            for _, name, values in self._seen(self.stock, chunk, of_input=False):
                targets[name].append(values)
            for group in self._groups(chunk):
                problems = {}
                for call in group:
                    with_bias = call.module.bias is not None or self._norm_behind(call) is not None
                    num_rows = sum(part.shape[1] for part in targets[call.name])
                    problems[call.name] = Ridge(call.module, with_bias=with_bias, ridge=self.ridge, num_rows=num_rows)
                for number, name, rows in self._seen(self.changed, group, of_input=True):
                    problems[name].add(rows, targets[name][number])
                yield group, list(problems.values())

    def _chunks(self, layers: Sequence[Call]) -> list[list[Call]]:
        """Successive layers whose targets fit into memory together."""
        chunks: list[list[Call]] = [[]]
        num_bytes = 0
        for call in layers:
            own = 4 * self._rounds * len(self.fit.images) * self._per_image(call) * call.module.weight.shape[0]
            if chunks[-1] and num_bytes + own > MAX_TARGET_BYTES:
                chunks.append([])
                num_bytes = 0
            chunks[-1].append(call)
            num_bytes += own
        return chunks

    def _groups(self, layers: Sequence[Call]) -> list[list[Call]]:
        """Successive layers of which none reads what another one changes."""
        groups: list[list[Call]] = []
        for call in layers:
            names = [other.name for other in groups[-1]] if groups else []
            if groups and call.name not in {other.name for other in self.flow.behind(names)}:
                groups[-1].append(call)
            else:
                groups.append([call])
        return groups

    @property
    def _rounds(self) -> int:
        return max(1, min(8, CROPS // len(self.fit.images)))

    def _per_image(self, call: Call) -> int:
        """Positions of a layer's output that are taken of each crop."""
        unknowns = call.module.weight[0].numel() + 1
        wanted = -(-max(ROWS, ROWS_PER_UNKNOWN * unknowns) // (len(self.fit.images) * self._rounds))
        return min(num_positions(call.module, call.out_shape), max(1, wanted))

    def _seen(self, model: nn.Module, calls: Sequence[Call], *, of_input: bool) -> Iterator[tuple[int, str, Tensor]]:
        """(batch, layer, rows): unfolded inputs or outputs, at the same random positions of the same crops."""
        generator = torch.Generator().manual_seed(self.seed)
        rows: dict[str, Tensor] = {}
        positions: dict[str, Tensor] = {}

        def catch(name: str):
            def hook(module: nn.Module, args: tuple, *out: Tensor) -> None:
                take = rows_of if of_input else targets_of
                rows[name] = take(module, args[0] if of_input else out[0], positions[name])
                if len(rows) == len(calls):  # the rest of the network need not run
                    raise _Reached

            return hook

        for number, batch in enumerate(crops(self.fit, self._rounds, self.seed)):
            start = int(torch.randint(2**31, (), generator=generator))
            for call in calls:
                total = num_positions(call.module, call.out_shape)
                own = torch.Generator().manual_seed(start + sum(map(ord, call.name)))
                positions[call.name] = torch.randperm(total, generator=own)[: self._per_image(call)].to(
                    self.place["device"]
                )
            rows.clear()
            handles = []
            for call in calls:
                layer = model.get_submodule(call.name)
                register = layer.register_forward_pre_hook if of_input else layer.register_forward_hook
                handles.append(register(catch(call.name)))
            try:
                with torch.no_grad():
                    model(batch.to(**self.place))
            except _Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            for call in calls:
                yield number, call.name, rows[call.name]


class _Reached(Exception):
    pass


def _reads_blurred(model: nn.Module, name: str) -> bool:
    """Whether the treated convolution itself reads a low-passed map (a dense one does not: its readers do)."""
    return not isinstance(model.get_submodule(name), DenseConv2d)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)
