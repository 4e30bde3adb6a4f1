"""Find the stem of a model by data flow: conv -> [norm] -> [act] -> max pool [-> blur], nothing else looking in."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from mixpool.ops.norm import is_supported_norm

# Functions and modules that pass a tensor on unchanged, or that a relu'd tensor passes unchanged.
_IDEMPOTENT = {F.relu, torch.relu, torch.relu_, F.relu_, F.relu6, "relu", "relu_"}
_CONVOLUTIONS = {F.conv2d, torch.conv2d}
_MAX_POOLS = {F.max_pool2d, torch.max_pool2d}
_BLURS = {"BlurPool2d"}
_MOST_CHECKS = 100
# How a check of shapes comes out that the input passes.
_CHECKS = {
    operator.eq: True,
    operator.ge: True,
    operator.le: True,
    operator.ne: False,
    operator.lt: False,
    operator.gt: False,
}
_OPAQUE_PACKAGES = ("torch.nn.", "torch.ao.", "torchvision.ops.")


class StemError(ValueError):
    """No stem that can be converted; the message names what was found instead."""


@dataclass
class FoundStem:
    """A stem inside a model: the names of its modules and the modules.

    Attributes:
        conv, norm, act, pool, blur: names; norm, act and blur may be None. An activation inside the norm layer
            (BatchNormAct2d) or called as a function has no name.
        modules: name -> module of the parts above.
        act_module: the activation as a module, wherever it came from.
        is_first: whether no other convolution comes before.
        taps: names of stem modules whose output is also an output of the model (features_only).
        notes: what a reader of the conversion report should know.
    """

    conv: str
    norm: str | None
    act: str | None
    pool: str
    blur: str | None
    modules: dict[str, nn.Module]
    act_module: nn.Module
    is_first: bool = True
    taps: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " -> ".join(name for name in (self.conv, self.norm, self.act, self.pool, self.blur) if name)


def find_stem(model: nn.Module, stem: str | None = None) -> FoundStem:
    """Find the convolution whose output, through norm and activation alone, enters a max pool.

    Args:
        model: any model that torch.fx can trace as far as its stem.
        stem: name of the convolution; default the first convolution that an image meets.
    Raises:
        StemError: there is none, or it cannot be converted; the message says what follows what.
    """
    if stem is not None:
        conv = dict(model.named_modules()).get(stem)
        if not isinstance(conv, nn.Conv2d):
            convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
            got = "no module of that name" if conv is None else type(conv).__name__
            raise StemError(f"expected stem={stem!r} to name a convolution, found {got}; convolutions: {_short(convs)}")
    trace = _trace(model, stem)
    conv_node = _conv_node(trace, stem)
    return _follow(trace, conv_node)


# --- tracing ----------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Keeps layers whole: torch's own, norm layers with activations, and blurs."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        name = f"{type(module).__module__}."
        return (
            name.startswith(_OPAQUE_PACKAGES)
            or isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm))
            or is_supported_norm(module)
            or type(module).__name__ in _BLURS
            or (".layers." in name and not any(module.children()))  # timm's layers and activations
        )

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Let checks of the input's shape pass: `if x.shape[1] != 3: raise`, `assert x.ndim == 4`.

        Only before the first max pool, and not for ever: a loop over the size has no symbolic end.
        """
        self.checks = getattr(self, "checks", 0) + 1
        is_check = obj.node.target in _CHECKS and all(
            _is_shape(operand) for operand in obj.node.args if isinstance(operand, fx.Node)
        )
        has_pool = any(
            node.op == "call_module" and isinstance(self.root.get_submodule(node.target), nn.MaxPool2d)
            for node in self.graph.nodes
        )
        if not is_check or has_pool or self.checks > _MOST_CHECKS:
            return super().to_bool(obj)
        return _CHECKS[obj.node.target]


def _is_shape(node: fx.Node) -> bool:
    """Whether a node is a size of some tensor: x.shape, x.ndim, x.size(), or an item of one."""
    if node.op == "call_function" and node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_shape(node.args[0])
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")


@dataclass
class _Trace:
    graph: fx.Graph
    root: nn.Module  # the traced module
    prefix: str  # its name in the model, with a dot
    failure: str | None  # why the rest of the model was not traced

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(node.target) if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """Name of the node for people: the module's, or the function's."""
        if node.op == "call_module":
            return self.prefix + node.target
        if node.op == "output":
            return "the model's output"
        target = node.target
        return f"{getattr(target, '__name__', target)}()"


def _trace(model: nn.Module, stem: str | None) -> _Trace:
    """Trace the model; if it cannot be traced and the stem is named, trace the part that holds it."""
    prefixes = [""]
    if stem is not None:
        parts = stem.split(".")[:-1]
        prefixes += [".".join(parts[: i + 1]) for i in range(len(parts))]
    failures = []
    for prefix in prefixes:  # from the whole model inwards
        root = model.get_submodule(prefix)
        if isinstance(root, (nn.ModuleList, nn.ModuleDict)) and type(root).forward is nn.Module.forward:
            continue
        tracer = _Tracer()
        failure = None
        try:
            graph = tracer.trace(root)
        except Exception as error:  # any Python in a model's forward can fail on a symbolic tensor
            graph = getattr(tracer, "graph", None)
            failure = f"{type(error).__name__}: {error}"
            failures.append(f"{prefix or 'the model'}: {_short([failure])}")
        if graph is None:
            continue
        trace = _Trace(graph, root, f"{prefix}." if prefix else "", failure)
        wanted = None if stem is None else stem.removeprefix(trace.prefix)
        pools = [node for node in graph.nodes if _is_max_pool(trace, node)]
        if failure is None or pools:
            if wanted is None or any(node.op == "call_module" and node.target == wanted for node in graph.nodes):
                return trace
    if stem is not None and not failures:
        raise StemError(f"expected the model's forward to call the stem {stem!r}, but it does not")
    hint = "" if stem is not None else '; if you know the stem\'s convolution, name it: stem="..."'
    raise StemError(f"the model's data flow cannot be traced as far as a max pool ({'; '.join(failures)}){hint}")


def _conv_node(trace: _Trace, stem: str | None) -> fx.Node:
    """The node of the stem's convolution: the named one, or the first that an image meets on its way to a max pool."""
    if stem is not None:
        return next(n for n in trace.graph.nodes if n.op == "call_module" and trace.prefix + n.target == stem)
    pools = [node for node in trace.graph.nodes if _is_max_pool(trace, node)]
    convs = [node for node in trace.graph.nodes if isinstance(trace.module(node), nn.Conv2d)]
    if not convs:
        functional = any(n.op == "call_function" and n.target in _CONVOLUTIONS for n in trace.graph.nodes)
        extra = ", only functional calls of conv2d" if functional else ""
        raise StemError(f"expected a model that starts with an nn.Conv2d, found no such module in its data flow{extra}")
    if not pools:
        raise StemError(
            f"expected a max pool after the first convolution ({trace.name(convs[0])}), found none in the model"
        )
    # A deep stem whose max pool is blurred is a BlurPool model: its last convolution is taken as it is.
    last = _conv_before(trace, pools[0])
    return last if last is not None and _blur_after(trace, pools[0]) is not None else convs[0]


def _conv_before(trace: _Trace, pool: fx.Node) -> fx.Node | None:
    """The convolution that feeds a pool through single-input nodes, if there is one."""
    node = pool
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        if isinstance(trace.module(node), nn.Conv2d):
            return node
    return None


def _blur_after(trace: _Trace, pool: fx.Node) -> fx.Node | None:
    users = [user for user in pool.users if not _is_shape_use(user)]
    return users[0] if len(users) == 1 and type(trace.module(users[0])).__name__ in _BLURS else None


def _is_max_pool(trace: _Trace, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _MAX_POOLS
    return isinstance(trace.module(node), nn.MaxPool2d)


# --- following the data -----------------------------------------------------------------------------------------------


def _follow(trace: _Trace, conv_node: fx.Node) -> FoundStem:
    """Walk from the convolution to the pool, taking each module for the part it plays."""
    path = [conv_node]
    norm = act = pool = blur = None
    act_module: nn.Module | None = None
    notes: list[str] = []
    node = conv_node
    taps: list[str] = []
    while pool is None:
        node = _only_user(trace, node, path, taps)
        path.append(node)
        module = trace.module(node)
        if isinstance(module, nn.MaxPool2d):
            pool = node
        elif module is not None and is_supported_norm(module) and norm is None and act_module is None:
            norm = node
            inner = getattr(module, "act", None)
            if inner is not None and not isinstance(inner, nn.Identity):
                act_module = inner
        elif module is not None and (isinstance(module, nn.Identity) or _is_inactive_dropout(module)):
            continue
        elif module is not None and _is_activation(module) and act_module is None:
            act, act_module = node, module
        elif node.op != "call_module" and node.target in _IDEMPOTENT and act_module is None:
            act_module = nn.ReLU6() if node.target is F.relu6 else nn.ReLU()
            notes.append(f"{trace.name(node)} stays in the model's forward; after the stem it changes nothing")
        else:
            raise StemError(_chain_message(trace, path))
    blur = _blur_after(trace, pool)
    ahead = _convolutions_before(trace, conv_node)
    if ahead:
        notes.append(
            f"{trace.name(conv_node)} is not the first convolution ({_short(ahead)} before it): its input is features, "
            'not images, so select="auto" keeps max pooling'
        )
    if trace.failure is not None:
        notes.append(f"traced only as far as the stem ({_short([trace.failure])})")
    parts = [n for n in (conv_node, norm, act, pool, blur) if n is not None]
    calls = [(node.op, node.target) for node in trace.graph.nodes]  # x.relu() is no call of a module named relu
    repeated = [trace.name(n) for n in parts if calls.count((n.op, n.target)) > 1]
    if repeated:
        raise StemError(f"expected each module of the stem to be called once, but {_short(repeated)} is called again")
    return FoundStem(
        conv=trace.name(conv_node),
        norm=norm and trace.name(norm),
        act=act and trace.name(act),
        pool=trace.name(pool),
        blur=blur and trace.name(blur),
        modules={trace.name(n): trace.module(n) for n in parts},
        act_module=act_module or nn.Identity(),
        is_first=not ahead,
        taps=taps,
        notes=notes,
    )


def _only_user(trace: _Trace, node: fx.Node, path: list[fx.Node], taps: list[str]) -> fx.Node:
    """The one node that uses `node`, apart from the model's output (a tap) and uses of its shape."""
    users = [user for user in node.users if not _is_shape_use(user)]
    outputs = [user for user in users if user.op == "output"]
    users = [user for user in users if user.op != "output"]
    if outputs:
        taps.append(trace.name(node))
    if len(users) != 1:
        used_by = _short([trace.name(user) for user in (users or outputs)]) or "nothing"
        raise StemError(
            f"expected conv -> norm -> activation -> max pool with nothing branching off, found that the output of "
            f"{trace.name(node)} goes to {used_by} ({_chain(trace, path)})"
        )
    return users[0]


def _convolutions_before(trace: _Trace, conv_node: fx.Node) -> list[str]:
    seen, queue = set(), list(conv_node.all_input_nodes)
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += node.all_input_nodes
    return [
        trace.name(node) for node in trace.graph.nodes if node in seen and isinstance(trace.module(node), nn.Conv2d)
    ]


def _chain(trace: _Trace, path: list[fx.Node]) -> str:
    def describe(node: fx.Node) -> str:
        module = trace.module(node)
        return trace.name(node) + (f" [{type(module).__name__}]" if module is not None else "")

    return " -> ".join(describe(node) for node in path)


def _chain_message(trace: _Trace, path: list[fx.Node]) -> str:
    last = path[-1]
    what = trace.module(last)
    if _is_max_pool(trace, last):
        reason = "the max pool is a functional call inside forward, which cannot be replaced"
    elif isinstance(what, nn.Conv2d):
        reason = "another convolution comes before any max pool"
        pools = [node for node in trace.graph.nodes if _is_max_pool(trace, node)]
        last = _conv_before(trace, pools[0]) if pools else None
        if last is not None and last is not path[0]:
            reason += f'; stem="{trace.name(last)}" would take the convolution before {trace.name(pools[0])}'
    else:
        reason = f"{trace.name(last)} is none of norm, activation or max pool that mixpool knows"
    return f"expected conv -> norm -> activation -> max pool, found {_chain(trace, path)}: {reason}"


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))


def _is_inactive_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0


def _is_shape_use(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in (getattr, "size", "dim")


def _short(items: list[str], limit: int = 300) -> str:
    text = ", ".join(items[:6]) + (", ..." if len(items) > 6 else "")
    return text if len(text) <= limit else text[:limit] + "..."
