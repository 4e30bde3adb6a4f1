"""The stem as one module: convolution, norm, activation and mixed pooling, at the place of the first convolution."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.filters.partner import apply_partner_map
from mixpool.filters.spectrum import center_frequency
from mixpool.ops.backend import Call, check_backend, why_reference
from mixpool.ops.functional import mixed_pool
from mixpool.ops.geometry import ConvGeometry, check_pool
from mixpool.ops.modes import in_functorch, needs_gradient, of_nobody, without_autocast
from mixpool.ops.norm import normalize, sign_of_scale, uses_batch_statistics
from mixpool.ops.reference import POOLINGS, Group, check_poolings, convolve_and_pool
from mixpool.ops.renamed import name_for_each, refuse_old
from mixpool.stem.parts import check_act, check_norm, check_parts, describe, pool_geometry, without_hooks
from mixpool.stem.state import Structure, decode_poolings, encode, is_readable, structure_of, structure_of_batch


class MixPoolStem(nn.Module):
    """conv -> norm -> act -> max pool as one module in which each channel has a pooling of its own.

    It is born on max pooling, equal to the stock stem; `lay` gives it a plan. With z = conv(x; W + iV), a and b the
    affine map of the norm layer, and all maxima and means over the pooling window:

        "max"       act(max of (a conv(x; W) + b)), as before
        "blurpool"  the same at every position, then a binomial mean at the pooling's stride
        "modulus"   act(|a| binomial mean of |z| + b)
        "energy"    act(|a| root of the binomial mean of |z|^2 + b)
        "cmod"      act(|a| |z| at the window's centre + b)

    The module owns the convolution's own `weight` and `bias` (the same Parameters) and the norm layer as its child
    `bn`. V is a fixed linear map of W, so it follows W in training and costs no parameter. New state is the buffer
    `plan`, (C_out, 3): the pooling of each channel and the direction of its frequency, on which V depends (`state.py`);
    and the buffer `calibration`, (C_out, 2): the gain and the offset that `calibrate` folded into the parameters (1 and
    0 if none). The plan may be written in any way (load_state_dict, in place, by functional_call): the next forward
    pass does what it says. A compiled stem follows `lay` and load_state_dict, and raises where the buffer was written
    to in another way. (On a GPU, a write through `.data`, of which torch keeps no account, only a compiled stem sees.)

    Args:
        conv: nn.Conv2d with zero padding and groups=1.
        norm: a batch norm of torch, torchvision or timm (with or without activation), or None.
        act: an elementwise increasing activation; default the norm layer's own, else none.
        pool: nn.MaxPool2d with a window of 2 or 3; default `nn.MaxPool2d(3, 2, 1)`.
        pooling: a name for all channels, or C_out names; as for `lay`.
        backend: "auto", "reference" (plain PyTorch) or "fused" (Triton; raises where it cannot run, and
            `why_not_fused` tells why). "auto" leaves it to the environment variable MIXPOOL_BACKEND, if set, and is the
            reference without it. The attribute can be changed.
    Where a scale of the norm layer is 0, the gradient of that scale is that of a positive one (the stock stem's is
    that of the window's first position).

    Raises:
        ValueError: a part cannot be taken over; the message names it. In forward: a part was replaced by such a one.
        RuntimeError: (in forward) the fused path was asked for by name and cannot run; the message says why.
    Reference: Leterme et al., arXiv 2209.11740 and arXiv 2212.00394.
    Example:
        >>> stem = MixPoolStem(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), pooling="modulus")
        >>> tuple(stem(torch.randn(2, 3, 224, 224)).shape)
        (2, 64, 56, 56)
    """

    plan: Tensor
    calibration: Tensor

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        act: nn.Module | None = None,
        pool: nn.MaxPool2d | None = None,
        *,
        pooling: str | Sequence[str] = "max",
        backend: str = "auto",
        **old: Any,
    ) -> None:
        super().__init__()
        chosen = "pooling=, a name or a list of names (convert and initialize choose by the filters)"
        refuse_old("MixPoolStem", old, select=chosen, images=chosen, calibrated=chosen, max_blur=name_for_each)
        pool = nn.MaxPool2d(3, 2, 1) if pool is None else pool
        act = act if act is not None else getattr(norm, "act", None) or nn.Identity()
        check_parts(conv, norm, act, pool)
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, 1
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = (0, 0) if conv.padding == "valid" else conv.padding
        self._conv = ConvGeometry(self.stride, self.padding, self.dilation)
        self._pool = check_pool(pool_geometry(pool))
        self.backend = check_backend(backend)

        self.weight, self.bias = conv.weight, conv.bias
        self.bn, self.act = norm, without_hooks(act)
        self.training = conv.training
        self.stock: Any = None  # conversion.stock.StockParts, set by convert
        self.before_calibration: dict[str, tuple[Tensor, Tensor]] | None = None  # see selection.calibrate
        self._structure: Structure | None = None
        with of_nobody():
            plan = torch.zeros(self.out_channels, 3)
            identity = torch.tensor([[1.0, 0.0]]).repeat(self.out_channels, 1)
            self.register_buffer("plan", plan.to(self.weight.device))
            self.register_buffer("calibration", identity.to(self.weight.device, self.weight.dtype))
        self._adopt(plan)
        if pooling != "max":
            self.lay(pooling)

    # ------------------------------------------------------------------------------------------------------- the plan

    def lay(self, pooling: str | Sequence[str], direction: Tensor | None = None) -> MixPoolStem:
        """Give each channel its pooling; returns the stem.

        Args:
            pooling: a name of `ops.reference.POOLINGS` for all channels, or C_out names.
            direction: (C_out, 2) frequency vectors (fy, fx), on which V depends; default the filters' own.
        Raises:
            ValueError: an unknown name, another number of names, or filters that do not exist yet (meta tensors).
        """
        poolings = check_poolings(pooling, self.out_channels)
        is_complex = [POOLINGS[name].is_complex for name in poolings]
        with of_nobody():
            if not any(is_complex):
                direction = torch.zeros(self.out_channels, 2)
            elif direction is None:
                if self.weight.is_meta:
                    raise ValueError("expected the convolution's weights to exist, got a meta tensor: load them first")
                direction = center_frequency(self.weight.detach().cpu())
            plan = encode(poolings, direction.detach().cpu())
            if self.plan.is_inference():  # loaded by assign=True in that mode; nobody may write to it outside
                self.plan = plan.to(self.plan)
            else:
                self.plan.copy_(plan)
        self._adopt(plan)
        return self

    @property
    def poolings(self) -> tuple[str, ...]:
        """The pooling of each channel."""
        return self.structure().poolings

    @property
    def num_complex(self) -> int:
        """How many channels pool by the complex convolution."""
        return sum(POOLINGS[name].is_complex for name in self.poolings)

    def structure(self) -> Structure:
        """What the buffer `plan` says now."""
        plan, device, dtype = self.plan, self.weight.device, self._partner_dtype
        if in_functorch() and torch._C._functorch.is_functorch_wrapped_tensor(plan):
            return structure_of_batch(plan, self.kernel_size, device, dtype)
        if is_readable(plan):
            # On a GPU a look at the numbers would wait for it, so only if the buffer was written to.
            seen = _place_of(plan)
            if seen is None or seen != self._seen or plan.device.type == "cpu":
                if not torch.equal(plan.detach().cpu().float(), self._structure.plan):
                    self._adopt(plan)
                self._seen = seen
        elif torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            # A graph cannot look at the numbers and trace anew: it stops where they are others than it was made for.
            is_same = (plan.round() == self._structure.numbers).all()
            torch._assert_async(
                is_same, "a stem's plan was written to after torch.compile: call its lay(), or compile anew"
            )
        if not self._structure.is_on(device, dtype):
            self._adopt(self._structure.plan)
        return self._structure

    def _adopt(self, plan: Tensor) -> None:
        """Keep what follows from a plan."""
        self._structure = structure_of(plan, self.kernel_size, self.weight.device, self._partner_dtype)
        self._seen = _place_of(self.plan)

    @property
    def _partner_dtype(self) -> torch.dtype:
        """V is a small difference of large terms, so its map is float32 also for half-precision weights."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _apply(self, fn, recurse: bool = True) -> MixPoolStem:
        super()._apply(fn, recurse)
        self._adopt(self._structure.plan)  # here and not in forward, which torch.compile may trace first
        return self

    # ------------------------------------------------------------------------------------------------------- the pass

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # one node in any symbolic trace, as torch's own layers are
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        self._check(x)
        structure = self.structure()
        sign, weight, bias, weight_imag = self._signed(structure.groups, self.imaginary_weight(structure))
        return mixed_pool(
            x,
            weight,
            bias,
            weight_imag,
            structure.groups,
            self._conv,
            self._pool,
            normalize=lambda parts: normalize(parts, structure.groups, self.bn, self.bias, sign),
            act=self.act,
            backend=self.backend,
            with_moments=uses_batch_statistics(self.bn),
            needs_grad=self._needs_grad(x),
        )

    def pool_and_normalize(self, x: Tensor, groups: Sequence[Group], weight_imag: Tensor | None = None) -> list[Tensor]:
        """Some channels, group after group, by the reference and before the activation; whatever the plan is.

        weight_imag: of the complex groups' channels, (n, C_in, kH, kW).
        """
        sign, weight, bias, weight_imag = self._signed(groups, weight_imag)
        options = {"with_moments": uses_batch_statistics(self.bn)}
        parts = convolve_and_pool(x, weight, bias, weight_imag, groups, self._conv, self._pool, **options)
        return normalize(parts, groups, self.bn, self.bias, sign)

    def imaginary_weight(self, structure: Structure | None = None) -> Tensor | None:
        """V of the complex channels, group after group, (num_complex, C_in, kH, kW); None if there are none."""
        structure = self.structure() if structure is None else structure
        if structure.partner_map is None:
            return None
        with without_autocast(self.weight):  # V is a small difference of large terms
            weight = self.weight.index_select(0, structure.complex_index)
            return apply_partner_map(structure.partner_map, weight.to(structure.partner_map.dtype)).to(weight.dtype)

    @property
    def total_stride(self) -> tuple[int, int]:
        """Pixels per step of the output, (y, x)."""
        return (self.stride[0] * self._pool.stride[0], self.stride[1] * self._pool.stride[1])

    @property
    def window(self) -> int:
        """Positions of the convolution under one pooling window, along its longer side."""
        return max(self._pool.size)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected images (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        try:
            check_norm(self.bn, self.out_channels)
            check_act(self.act)
            if self.stock is not None and not torch.compiler.is_compiling():
                self.stock.check()
        except ValueError as error:  # another tool has replaced it
            raise ValueError(
                f"{error}; revert(model), replace the part of the stock model, and convert again"
            ) from None

    def _needs_grad(self, x: Tensor) -> bool:
        norm = self.bn
        # By name: the replicas of nn.DataParallel have no parameters.
        return needs_gradient(x, self.weight, self.bias, getattr(norm, "weight", None), getattr(norm, "bias", None))

    def _call(self, x: Tensor) -> Call:
        """What the choice of the backend depends on."""
        self._check(x)
        return Call(x, self.weight, self.structure().groups, self._conv, self._pool, self._needs_grad(x))

    def _signed(
        self, groups: Sequence[Group], weight_imag: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """(sign of the norm layer's scale, W, bias, V), the latter three times the sign."""
        sign = sign_of_scale(self.bn)
        weight, bias = self.weight, self.bias
        if sign is not None:
            signs = sign.to(weight.dtype)  # the norm layer may be float32 around a bfloat16 convolution
            weight = weight * signs[:, None, None, None]
            bias = None if bias is None else bias * signs
            if weight_imag is not None:
                index = torch.cat([group.index for group in groups if POOLINGS[group.pooling].is_complex])
                weight_imag = weight_imag * signs.index_select(0, index)[:, None, None, None]
        return sign, weight, bias, weight_imag

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        parts += [
            f"{name}={value}" for name, value in self._conv._asdict().items() if value != ConvGeometry()._asdict()[name]
        ]
        parts.append(f"bias={self.bias is not None}")
        parts.append("pool=" + repr(self._pool).removeprefix("PoolGeometry"))
        poolings = self._structure.poolings
        parts.append("pooling=" + " + ".join(f"{poolings.count(n)} {n}" for n in POOLINGS if n in poolings))
        parts += [] if self.backend == "auto" else [f"backend={self.backend!r}"]
        return ", ".join(parts)

    # -------------------------------------------------------------------------------------------------- the state dict

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        is_stock = prefix + "weight" in state_dict and prefix + "plan" not in state_dict
        if is_stock:
            warnings.warn(
                f"{prefix.rstrip('.') or 'stem'}: this checkpoint has no channel plan (a stock model's); the weights "
                f"are loaded and the present plan stays ({self.num_complex} of {self.out_channels} channels complex), "
                "though it was chosen for other weights. To choose anew: load into the stock model, then convert.",
                stacklevel=2,
            )
            calibration = torch.ones_like(self.calibration)
            calibration[:, 1] = 0
            state_dict = {**state_dict, prefix + "plan": self.plan, prefix + "calibration": calibration}
        if prefix + "weight_imag" in state_dict:
            errors.append(
                f'{prefix}weight_imag is in the checkpoint, which was converted with imag="free": mixpool 0.2 has no '
                "free imaginary filters any more. Load it with mixpool 0.1, or convert the stock model again."
            )
        plan = state_dict.get(prefix + "plan")
        if isinstance(plan, Tensor) and plan.shape == self.plan.shape and not plan.is_meta:
            try:  # before anything is changed
                decode_poolings(plan)
            except ValueError as error:
                errors.append(f"{prefix}plan: {error}")
                return
        old_calibration = self.calibration.clone()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        if not self.plan.is_meta:
            self._adopt(self.plan)  # also where the plan is the old one: .to_empty() leaves garbage in the buffer
        if not _is_same(old_calibration, self.calibration):
            self.before_calibration = None


def why_not_fused(stem: MixPoolStem, x: Tensor) -> str | None:
    """None if `stem(x)` takes the fused path, under the stem's backend, modes and the present autocast; else why not.

    Args:
        stem: a MixPoolStem.
        x: images as the stem gets them, (N, C_in, H, W).
    Raises:
        ValueError: `stem` is something else, or its backend does not exist.
    Example:
        >>> stem = MixPoolStem(nn.Conv2d(3, 64, 7, 2, 3), pooling="modulus")
        >>> why_not_fused(stem, torch.randn(2, 3, 224, 224, dtype=torch.float64)) is None
        False
    """
    if not isinstance(stem, MixPoolStem):
        raise ValueError(f"expected a MixPoolStem, got {describe(stem)}")
    return why_reference(stem.backend, stem._call(x))


def _place_of(plan: Tensor) -> tuple[int, int] | None:
    """What changes when a buffer is written to or exchanged; None where that cannot be told."""
    if plan.is_inference() or not is_readable(plan):
        return None
    return plan.data_ptr(), plan._version


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and not a.is_meta and torch.equal(a, b)
