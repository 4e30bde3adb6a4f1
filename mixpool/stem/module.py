"""The stem as one module: convolution, norm, activation and mixed pooling, at the place of the first convolution."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixpool.filters.partner import analytic_partner_map, apply_partner_map
from mixpool.ops.backend import Call, check_backend, compute_dtype, needs_gradient, takes_fused, why_reference
from mixpool.ops.functional import check_pooling, memory_format_of, split_channels
from mixpool.ops.fused import halves, ops
from mixpool.ops.fused.geometry import StemGeometry
from mixpool.ops.geometry import ConvGeometry
from mixpool.ops.modes import without_autocast
from mixpool.ops.norm import affine_of_pooled, normalize_pooled, sign_of_scale, uses_batch_statistics
from mixpool.ops.reference import Channels, Pooled, activate_and_merge, convolve_and_pool
from mixpool.selection.calibrate import calibrate
from mixpool.selection.plan import KINDS, ChannelPlan
from mixpool.selection.rules import Select, make_plan
from mixpool.stem.parts import check_parts, describe, pool_geometry, without_hooks


class MixPoolStem(nn.Module):
    """conv -> norm -> act -> max pool as one module that pools each channel by its maximum or by a modulus.

    With W + iV the complex kernel, a and b the affine map of the norm layer:

        max channels      act(max over the window of (a conv(x; W) + b))
        modulus channels  act(|a| binomial mean over the window of |conv(x; W + iV)| + b)

    The module owns the convolution's own `weight` and `bias` (the same Parameters) and the norm layer as its child
    `bn`. Its new state is the buffer `plan`, (C_out, 3): the kind of each channel with its blur, and the direction of
    its frequency in 0.01 degree, on which V depends (`ChannelPlan.encode`); and the buffer `calibration`, (C_out, 2):
    the gain and the offset that `calibrate` folded into the parameters (1 and 0 if none).

    Args:
        conv: nn.Conv2d with zero padding and groups=1.
        norm: a batch norm of torch, torchvision or timm (with or without activation), or None.
        act: an elementwise increasing activation; default the norm layer's own, else none.
        pool: nn.MaxPool2d with a window of 2 or 3; default `nn.MaxPool2d(3, 2, 1)`.
        select: which channels take the modulus: "auto", "all", "none", C_out booleans, or a function of FilterStats.
        blur: 3 for the binomial mean of the modulus over the window, 1 for its centre alone (paper 2's CMod).
        max_blur: 3 to pool the max channels as BlurPool does (stride-1 max, then binomial decimation), 1 to keep them.
        imag: "tied": V is a fixed linear map of W and follows it in training; "free": V is the parameter
            `weight_imag`, and starts there.
        images: a batch of the stem's input, (N, C_in, H, W), or an iterable of them, by which `select="auto"`
            measures its candidates and calibrates the affine maps of the channels it swaps. Without them "auto"
            predicts from the weights, and calibrates a trained stem on synthetic pictures.
        calibrated: False to measure only and leave all parameters as they are.
        backend: "auto": the fused path where it can run and was measured to be faster, and the reference elsewhere
            (`why_not_fused` tells which and why); "reference" or "fused" by name: the latter raises where it cannot
            run. "auto" leaves it to the environment variable MIXPOOL_BACKEND, if set. The attribute can be changed.
    Where a scale of the norm layer is 0, the gradient of that scale is that of a positive one (the stock stem's is
    that of the window's first position).

    Raises:
        ValueError: a part cannot be taken over; the message names it.
        RuntimeError: (in forward) the fused path was asked for by name and cannot run; the message says why.
    Reference: Leterme et al., arXiv 2209.11740 and arXiv 2212.00394.
    Example:
        >>> stem = MixPoolStem(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), select="all")
        >>> tuple(stem(torch.randn(2, 3, 224, 224)).shape)
        (2, 64, 56, 56)
    """

    plan: Tensor
    calibration: Tensor
    max_index: Tensor
    modulus_index: Tensor
    backend: str = "auto"  # also of stems that were pickled before there was a choice

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        act: nn.Module | None = None,
        pool: nn.MaxPool2d | None = None,
        *,
        select: Select = "auto",
        blur: int = 3,
        max_blur: int = 1,
        imag: str = "tied",
        images: Tensor | Iterable[Tensor] | None = None,
        calibrated: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2, 1) if pool is None else pool
        act = act if act is not None else getattr(norm, "act", None) or nn.Identity()
        check_parts(conv, norm, act, pool)
        if imag not in ("tied", "free"):
            raise ValueError(f'expected imag to be "tied" or "free", got {imag!r}')
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, 1
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = (0, 0) if conv.padding == "valid" else conv.padding
        self._conv = ConvGeometry(self.stride, self.padding, self.dilation)
        self._pool = pool_geometry(pool)
        self.imag, self.blur, self.max_blur = imag, blur, max_blur
        check_pooling(self._pool, blur, max_blur)
        self.backend = check_backend(backend)

        self.weight, self.bias = conv.weight, conv.bias
        self.bn, self.act = norm, without_hooks(act)
        self.training = conv.training
        self.stock: Any = None  # checkpoint.StockParts, set by convert
        self.before_calibration: dict[str, tuple[Tensor, Tensor]] | None = None  # see calibration.stock_values
        plan, fits = make_plan(select, self, images)
        self.channel_plan: ChannelPlan | None = plan
        self.register_buffer("plan", plan.encode(blur, max_blur).to(self.weight.device))
        identity = torch.tensor([[1.0, 0.0]], device=self.weight.device, dtype=self.weight.dtype)
        self.register_buffer("calibration", identity.repeat(self.out_channels, 1))
        if imag == "free":
            self.weight_imag = nn.Parameter(torch.zeros_like(self.weight), requires_grad=self.weight.requires_grad)
        self._adopt_plan()
        if imag == "free":
            self._start_free_partner(self.weight)
        if fits is not None and calibrated:
            calibrate(self, fits)

    # ------------------------------------------------------------------------------------------------------- the plan

    @property
    def kinds(self) -> tuple[str, ...]:
        """ "max" or "modulus" for each channel."""
        return tuple(KINDS[code & 1] for code in self._codes)

    @property
    def num_modulus(self) -> int:
        return len(self.modulus_index)

    @property
    def total_stride(self) -> tuple[int, int]:
        """Pixels per step of the output, (y, x)."""
        return (self.stride[0] * self._pool.stride[0], self.stride[1] * self._pool.stride[1])

    @property
    def window(self) -> int:
        """Positions of the convolution under one pooling window, along its longer side."""
        return max(self._pool.size)

    def _adopt_plan(self) -> None:
        """Set everything that follows from the `plan` buffer: the channel lists, the blurs and the partner map."""
        plan = self.plan.cpu()
        self._codes = ChannelPlan.decode_codes(plan)
        channels = split_channels([code & 1 for code in self._codes], self.weight.device)
        self.register_buffer("max_index", channels.max, persistent=False)
        self.register_buffer("modulus_index", channels.modulus, persistent=False)
        direction = ChannelPlan.decode_direction(plan)[channels.modulus.cpu()]
        partner_map = None
        if len(channels.modulus) > 0:
            partner_map = analytic_partner_map(direction, self.kernel_size)
            partner_map = partner_map.to(self.weight.device, self._partner_dtype)
        self.register_buffer("partner_map", partner_map, persistent=False)
        for name, blurs in zip(("max_blur", "blur"), ChannelPlan.decode_blurs(self._codes), strict=True):
            if blurs:
                setattr(self, name, blurs)

    @property
    def _partner_dtype(self) -> torch.dtype:
        """V is a small difference of large terms, so its map is float32 also for half-precision weights."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _apply(self, fn, recurse: bool = True) -> MixPoolStem:
        super()._apply(fn, recurse)
        if self.partner_map is not None and self.partner_map.dtype != self._partner_dtype:
            self._adopt_plan()  # .half() or .double() rounded the map
        return self

    @torch.no_grad()
    def _start_free_partner(self, weight: Tensor) -> None:
        self.weight_imag.zero_()
        if self.num_modulus > 0:
            start = apply_partner_map(self.partner_map, weight.to(self.partner_map).index_select(0, self.modulus_index))
            self.weight_imag.index_copy_(0, self.modulus_index, start.to(self.weight_imag.dtype))

    # ------------------------------------------------------------------------------------------------------- the pass

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # one node in any symbolic trace, as torch's own layers are
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        channels = Channels(self.max_index, self.modulus_index)
        call = self._call(x)
        options = {}
        if takes_fused(self.backend, call):
            if self.max_blur == 1 or len(channels.max) == 0:
                return self._fused(x, channels, call.needs_grad)
            options = {"operation": halves.convolve_and_pool, "dtype": compute_dtype(x)}
        parts = self.pool_and_normalize(x, channels, self.imaginary_weight(), **options)
        return activate_and_merge(*parts, channels, self.act, self._pool, self.max_blur, memory_format_of(x))

    def _call(self, x: Tensor) -> Call:
        """What the choice of the backend depends on."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected images (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        weight, norm = self.weight, self.bn
        # By name: the replicas of nn.DataParallel have no parameters.
        trained = [weight, self.bias, getattr(self, "weight_imag", None)]
        trained += [getattr(norm, "weight", None), getattr(norm, "bias", None)]
        needs_grad = needs_gradient(x, *trained)
        geometry = (self._conv, self._pool, self.blur, self.max_blur)
        return Call(x, weight, self.num_modulus, *geometry, needs_grad, uses_batch_statistics(norm))

    def _fused(self, x: Tensor, channels: Channels, needs_grad: bool) -> Tensor:
        """The pass on the fused path: one operator, or two where gradients or batch statistics are needed."""
        sign, weight, _, weight_imag = self._with_sign(channels, self.imaginary_weight())
        relu = type(self.act) is nn.ReLU
        with_moments = uses_batch_statistics(self.bn)
        tensors = (x, weight, weight_imag, channels, self._conv, self._pool)
        options = {"blur": self.blur, "dtype": compute_dtype(x)}
        if needs_grad or with_moments:
            pooled, moments = ops.convolve_and_pool(*tensors, with_moments=with_moments, **options)
            geometry = StemGeometry.of(x, weight, self._conv, self._pool)
            counts = tuple(len(x) * geometry.positions(kind) for kind in ("max", f"modulus{self.blur}"))
            scale, shift = affine_of_pooled(moments, counts, self.bn, self.bias, sign, channels)
            out = ops.affine_relu(pooled, scale, shift, relu)
        else:
            scale, shift = affine_of_pooled(None, (0, 0), self.bn, self.bias, sign, channels)
            out, _ = ops.convolve_and_pool(*tensors, scale=scale, shift=shift, relu=relu, **options)
        return out if relu else self.act(out)

    def _with_sign(
        self, channels: Channels, weight_imag: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """(sign of the norm layer's scale, W, bias, V), the latter three times the sign."""
        sign = sign_of_scale(self.bn)
        weight, bias = self.weight, self.bias
        if sign is not None:
            signs = sign.to(weight.dtype)  # the norm layer may be float32 around a bfloat16 convolution
            weight = weight * signs[:, None, None, None]
            bias = None if bias is None else bias * signs
            if weight_imag is not None:
                weight_imag = weight_imag * signs.index_select(0, channels.modulus)[:, None, None, None]
        return sign, weight, bias, weight_imag

    def pool_and_normalize(
        self,
        x: Tensor,
        channels: Channels,
        weight_imag: Tensor | None,
        max_blur: int | None = None,
        operation: Callable[..., Pooled] = convolve_and_pool,
        **options: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The max part and the modulus part of some channels, by the reference, before the activation."""
        sign, weight, bias, weight_imag = self._with_sign(channels, weight_imag)
        pooled = operation(
            x,
            weight,
            bias,
            weight_imag,
            channels,
            self._conv,
            self._pool,
            blur=self.blur,
            max_blur=self.max_blur if max_blur is None else max_blur,
            with_moments=uses_batch_statistics(self.bn),
            **options,
        )
        return normalize_pooled(pooled, self.bn, self.bias, sign, channels)

    def imaginary_weight(self) -> Tensor | None:
        """V of the modulus channels, (num_modulus, C_in, kH, kW); None if there is none."""
        if self.num_modulus == 0:
            return None
        if self.imag == "free":
            return self.weight_imag.index_select(0, self.modulus_index)
        with without_autocast(self.weight):  # V is a small difference of large terms
            weight = self.weight.index_select(0, self.modulus_index)
            return apply_partner_map(self.partner_map, weight.to(self.partner_map.dtype)).to(weight.dtype)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        parts += [
            f"{name}={value}" for name, value in self._conv._asdict().items() if value != ConvGeometry()._asdict()[name]
        ]
        parts.append(f"bias={self.bias is not None}")
        parts.append("pool=" + repr(self._pool).removeprefix("PoolGeometry"))
        parts.append(f"modulus={self.num_modulus}/{self.out_channels}")
        parts.append(f"blur={self.blur}, max_blur={self.max_blur}, imag={self.imag!r}")
        parts += [] if self.backend == "auto" else [f"backend={self.backend!r}"]
        return ", ".join(parts)

    # -------------------------------------------------------------------------------------------------- the state dict

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        weight = state_dict.get(prefix + "weight")
        is_stock = weight is not None and prefix + "plan" not in state_dict
        added = {}
        if is_stock:
            warnings.warn(
                f"{prefix.rstrip('.') or 'stem'}: this checkpoint has no channel plan (a stock model's); the weights "
                f"are loaded and the present plan stays ({self.num_modulus} of {self.out_channels} on modulus), though "
                "it was chosen for other weights. To choose anew: load into the stock model, then convert.",
                stacklevel=2,
            )
            calibration = torch.ones_like(self.calibration)
            calibration[:, 1] = 0
            added = {prefix + "plan": self.plan, prefix + "calibration": calibration}
        if prefix + "weight_imag" in state_dict and self.imag == "tied":
            errors.append(
                f'{prefix}weight_imag is in the checkpoint, which was converted with imag="free", and this model has '
                'imag="tied": convert it with imag="free".'
            )
        free_start = self.imag == "free" and weight is not None and prefix + "weight_imag" not in state_dict
        if free_start:
            added[prefix + "weight_imag"] = self.weight_imag.detach()
        state_dict = {**state_dict, **added} if added else state_dict
        plan = state_dict.get(prefix + "plan")
        if isinstance(plan, Tensor) and plan.shape == self.plan.shape and not plan.is_meta:
            try:  # before anything is changed
                ChannelPlan.decode_blurs(ChannelPlan.decode_codes(plan))
            except ValueError as error:
                errors.append(f"{prefix}plan: {error}")
                return
        old_plan, old_calibration = self.plan.clone(), self.calibration.clone()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        if not self.plan.is_meta:
            self._adopt_plan()  # also where the plan is the old one: .to_empty() leaves garbage in what follows from it
        if not _is_same(old_plan, self.plan):
            self.channel_plan = None  # its reasons were those of other weights
        if not _is_same(old_calibration, self.calibration):
            self.before_calibration = None
        if free_start and weight.shape == self.weight.shape:
            self._start_free_partner(weight)


class BlurPoolStem(MixPoolStem):
    """Baseline: every channel by max pooling at stride 1 and binomial decimation (Zhang 2019, arXiv 1904.11486)."""

    def __init__(self, conv, norm=None, act=None, pool=None, *, backend: str = "auto") -> None:
        super().__init__(conv, norm, act, pool, select="none", max_blur=3, backend=backend)


class CModStem(MixPoolStem):
    """Baseline: the plain CMod of Leterme et al., arXiv 2212.00394: the modulus at the windows' centres, no blur."""

    def __init__(
        self,
        conv,
        norm=None,
        act=None,
        pool=None,
        *,
        select: Select = "all",
        imag: str = "tied",
        backend: str = "auto",
    ) -> None:
        super().__init__(conv, norm, act, pool, select=select, blur=1, imag=imag, backend=backend)


def why_not_fused(stem: MixPoolStem, x: Tensor) -> str | None:
    """None if `stem(x)` takes the fused path, under the stem's backend, modes and the present autocast; else why not.

    Under "auto" the answer rests on a trial of the fused path, which the first question makes.

    Args:
        stem: a MixPoolStem.
        x: images as the stem gets them, (N, C_in, H, W).
    Raises:
        ValueError: `stem` is something else, or its backend does not exist.
    Example:
        >>> stem = MixPoolStem(nn.Conv2d(3, 64, 7, 2, 3), select="all")
        >>> why_not_fused(stem, torch.randn(2, 3, 224, 224, dtype=torch.float64)) is None
        False
    """
    if not isinstance(stem, MixPoolStem):
        raise ValueError(f"expected a MixPoolStem, got {describe(stem)}")
    return why_reference(stem.backend, stem._call(x))


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and not a.is_meta and torch.equal(a, b)
