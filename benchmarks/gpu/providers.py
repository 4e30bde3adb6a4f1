"""What computes the stem on a GPU: what a model has today, mixpool's reference and its fused path.

One case is a stem, a plan, a batch, a dtype, a layout and a pass; its providers run interleaved, in one process:

    stock                   conv, norm, ReLU, max pool as torchvision and timm have them
    stock reordered         the same numbers, pooled before the affine step (mixpool's reference of the plan "max")
    reference, fused        mixpool with the case's plan, by the name of its backend
    ... compiled            torch.compile
    ... max-autotune        torch.compile(mode="max-autotune"): CUDA graphs, the input's address declared as fixed
    ... max-autotune no graphs    the same without CUDA graphs
    fused graph             the forward pass captured in a CUDA graph

A provider that is not there, or that fails, yields a record with the reason and never another path's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import COMPILE_MODES, TUNED, Case, how_compiled
from benchmarks.kit import timing
from benchmarks.kit.stems import MAX, Unavailable, images, mixpool_stem, stock_stem


class Bench:
    """The tensors of one setting and its providers as calls; the stock ones serve all its cases."""

    def __init__(self, case: Case, device: str, dry: bool) -> None:
        self.device, self.dry = device, dry
        self.x = images(case.shape, case.batch, case.dtype, device, case.layout)
        self.fixed = self.x.detach()  # the same memory, for CUDA graphs that need not copy it
        self._stock: dict[str, Callable[[], object] | Unavailable] = {}

    def call(self, case: Case, provider: str) -> Callable[[], object]:
        """A provider, run a few times; Unavailable with the reason if it cannot run."""
        if not provider.startswith("stock"):
            return self._built(case, provider)
        if provider not in self._stock:
            try:
                self._stock[provider] = self._built(case, provider)
            except Unavailable as error:
                self._stock[provider] = error
        found = self._stock[provider]
        if isinstance(found, Unavailable):
            raise found
        return found

    def _built(self, case: Case, provider: str) -> Callable[[], object]:
        module = self.module(case, provider)
        how = how_compiled(provider)
        x = self.fixed if how == TUNED else self.x
        made: list[Callable[[], object]] = []

        def build() -> None:
            if provider == "fused graph":
                made.append(self._captured(case, module))
            elif case.mode == "forward":
                made.append(forward_call(case, compiled(module, how, self.dry), x, self.device, how == TUNED))
            else:
                made.append(full_call(case, compiled(module, how, self.dry), module, x, self.device, how == TUNED))
            for _ in range(1 if self.dry else 4):  # CUDA graphs are recorded at the third call
                made[0]()

        if how == TUNED:
            torch._dynamo.mark_static_address(x)
        reason = timing.attempt(build, self.device)
        if reason is not None:
            raise Unavailable(why(module, self.x, reason))
        return made[0]

    def module(self, case: Case, provider: str) -> nn.Module:
        """A provider's own stem, in training or evaluation, on the device."""
        where = {"dtype": case.dtype, "device": self.device, "layout": case.layout}
        if provider == "stock reordered":
            module = mixpool_stem(case.shape, MAX, "reference", **where)
        elif provider.startswith("stock"):
            module = stock_stem(case.shape, **where)
        else:
            module = mixpool_stem(case.shape, case.plan, provider.split()[0], **where)
        return module.train(case.mode == "full")

    def _captured(self, case: Case, module: nn.Module) -> Callable[[], object]:
        if self.device == "cpu":
            raise RuntimeError("CUDA graphs need a CUDA device")
        eager = forward_call(case, module, self.x, self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                eager()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = eager()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def compiled(module: nn.Module, how: str | None, dry: bool = False) -> Callable[[Tensor], Tensor]:
    """The module, or torch.compile of it (without code generation in a dry run)."""
    if how is None:
        return module

    def call(x: Tensor) -> Tensor:
        return module(x)

    # Code of its own: dynamo keeps what it compiled with the code, and would try all others' guards at every call.
    call.__code__ = call.__code__.replace(co_name=f"call_{id(module)}")
    options: dict[str, Any] = {"backend": "aot_eager"} if dry else {"mode": COMPILE_MODES[how]}
    return torch.compile(call, dynamic=False, **options)


def autocast_of(case: Case, device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=case.dtype == "autocast")


def forward_call(case: Case, function: Callable, x: Tensor, device: str, in_graphs: bool = False):
    """One pass in evaluation."""

    @torch.inference_mode()
    def forward() -> Tensor:
        if in_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast_of(case, device):
            return function(x)

    return forward


def full_call(case: Case, function: Callable, module: nn.Module, x: Tensor, device: str, in_graphs: bool = False):
    """One pass in training: forward, and backward for all parameters from a random upstream gradient."""
    parameters = list(module.parameters())
    upstream: list[Tensor] = []

    def full() -> tuple[Tensor, ...]:
        if in_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast_of(case, device):
            out = function(x)
        if not upstream:
            upstream.append(torch.randn_like(out))
        return torch.autograd.grad(out, parameters, upstream[0])

    return full


def why(module: nn.Module, x: Tensor, reason: str) -> str:
    """The reason of a failure, with what mixpool itself says about the fused path."""
    import mixpool

    question = getattr(mixpool, "why_not_fused", None)
    if question is None or getattr(module, "backend", None) != "fused":
        return reason
    try:
        answer = question(module, x)
    except Exception as error:
        answer = f"why_not_fused failed: {timing.reason_of(error)}"
    return reason if answer is None else f"{reason} [{answer}]"
