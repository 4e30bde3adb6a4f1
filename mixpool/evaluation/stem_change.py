"""How much a model's stem changes when its input moves, on the frames of the flips: `evaluation.shifts` over a dataset.

`shifts.relative_change` wants all feature maps at once. Its three means, over images and positions, are taken here
from sums per image, so that a dataset of any size fits and the bootstrap can draw images.

Legend: N images, D = 3 directions, K = 8 shifts, C channels, S bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mixpool.conversion.find import StemError, find_stem
from mixpool.conversion.stock import converted_stems, unwrapped
from mixpool.evaluation.metrics import Interval, percentile_ends, resampled_means
from mixpool.evaluation.protocols import Flips
from mixpool.evaluation.shifts import BORDER, DIRECTIONS

MAX_IMAGES = 1000  # of a dataset, evenly spread: the interval is then narrow enough, and the sums stay small


class StemFrames(Flips):
    """The protocol of the stem's change: the frames of `Flips`, whose outputs are the stem's maps and no logits."""

    def measure(self, outputs: Iterator[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Means over the positions of each map, those at its border left out.

        Returns:
            stem_square: (N, D, K, C) of the squared change; stem_mean, stem_mean_square: (N, C) of the first map.
        """
        first = _inside(next(outputs))
        squares = torch.stack([(_inside(map_) - first).square().mean(dim=(2, 3)) for map_ in outputs], dim=1)
        return {
            "stem_square": squares.unflatten(1, (len(DIRECTIONS), -1)),
            "stem_mean": first.mean(dim=(2, 3)),
            "stem_mean_square": first.square().mean(dim=(2, 3)),
        }


def changes_at_all(sums: Mapping[str, Tensor]) -> bool:
    """Whether any channel of the stem is not constant; without one there is no change to speak of."""
    return bool(_is_alive(sums["stem_mean"].double().mean(dim=0), sums["stem_mean_square"].double().mean(dim=0)).any())


def stem_change(sums: Mapping[str, Tensor]) -> Interval:
    """(D, K) change of `evaluation.shifts`, mean over the channels that are not constant, with its 95 % interval.

    Bootstrap samples in which all channels are constant say nothing and are left out.

    Args:
        sums: as `StemFrames.measure` returns them, of all images.
    """
    value, drawn = _with_draws(sums)
    return Interval(value, *percentile_ends(drawn))


def stem_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Interval:
    """(D, K) change of the second stem minus that of the first, both on the same images, with its paired interval."""
    (ours, our_draws), (theirs, their_draws) = _with_draws(first), _with_draws(second)
    return Interval(theirs - ours, *percentile_ends(their_draws - our_draws))


def _with_draws(sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The change (D, K), and that of each bootstrap sample (S, D, K)."""
    columns = [sums[name] for name in ("stem_square", "stem_mean", "stem_mean_square")]
    # One seed: the same images in all three, and for any stem on as many images.
    drawn = _change(*(resampled_means(column) for column in columns))
    return _change(*(column.double().mean(dim=0) for column in columns)), drawn


def _change(square: Tensor, mean: Tensor, mean_square: Tensor) -> Tensor:
    ratio = (square / (mean_square - mean.square())[..., None, None, :]).sqrt()
    return torch.where(_is_alive(mean, mean_square)[..., None, None, :], ratio, torch.nan).nanmean(dim=-1)


def _is_alive(mean: Tensor, mean_square: Tensor) -> Tensor:
    return mean_square - mean.square() > 1e-6 * mean_square  # below lies the rounding of a constant map's float32 sums


def find_stem_of(model: nn.Module) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """The function from images to the stem's pooled maps, and which stem that is; or None, and why there is none.

    A converted model's stem is its first MixPoolStem; else the stem is found by data flow, as `convert` does.
    """
    model = unwrapped(model)
    for name, stem in converted_stems(model).items():
        return stem, f"stem: {name} (MixPoolStem)"
    try:
        found = find_stem(model)
    except StemError as error:
        return None, f"stem change not applicable: {error}"
    if not found.is_first:
        return None, f"stem change not applicable: the first stem, {found}, is not at the image"
    conv, pool = found.modules[found.conv], found.modules[found.pool]
    norm = None if found.norm is None else found.modules[found.norm]
    parts = [conv, norm]
    if getattr(norm, "act", None) is not found.act_module:  # else the norm layer applies it already
        parts.append(found.act_module)
    parts += [pool, None if found.blur is None else found.modules[found.blur]]
    return nn.Sequential(*(part for part in parts if part is not None)), f"stem: {found}"


def _inside(maps: Tensor) -> Tensor:
    if maps.ndim != 4 or min(maps.shape[-2:]) <= 2 * BORDER:
        raise ValueError(f"expected feature maps (N, C, H, W) of more than {2 * BORDER} positions, got {maps.shape}")
    return maps[..., BORDER:-BORDER, BORDER:-BORDER].float()
