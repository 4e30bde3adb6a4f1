"""What a classifier's outputs say about its accuracy and its steadiness under shifts: pure functions of tensors.

Every function returns one value per image, so that means, intervals and paired differences are taken once, at the end,
and over images. Shares lie in [0, 1] here; reports and records show them in percent.

Legend: N images, C classes, T frames (the same image, moved further from frame to frame), S bootstrap draws.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2000  # bootstrap draws: the ends of a 95 % interval then move by some percent of its width between seeds
_CHUNK = 2**22  # numbers of a table of draws that is in memory at once


class Interval(NamedTuple):
    """A mean with the ends of its interval, each a tensor of the values' shape without the images."""

    mean: Tensor
    low: Tensor
    high: Tensor


# --- one value per image ----------------------------------------------------------------------------------------------


def top_k(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N,) bool: whether fewer than k classes score higher than the label's.

    Of equal scores that of the lower class number counts as the higher one, so that k=1 is torch.argmax.

    Args:
        logits: (N, C) scores or probabilities.
        labels: (N,) class numbers.
        k: 1 to C.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (N, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"expected k from 1 to the {logits.shape[1]} classes, got {k}")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < logits.shape[1]):
        raise ValueError(f"expected labels from 0 to {logits.shape[1] - 1}, got {labels.min()} to {labels.max()}")
    own = logits.gather(1, labels[:, None])
    is_before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | (logits == own) & is_before).sum(dim=1) < k


def shift_consistency(first: Tensor, second: Tensor) -> Tensor:
    """(N,) bool: whether both crops of an image get the same class, right or wrong, from (N,) predicted classes.

    Its mean is the classification consistency of Zhang, "Making Convolutional Networks Shift-Invariant Again", 2019,
    arXiv 1904.11486: P(argmax f(shift_1(x)) = argmax f(shift_2(x))) over images and both shifts; in percent, higher is
    better. With `torch.roll` for the shift it is the circular consistency of Chaman and Dokmanic, "Truly
    Shift-Invariant Convolutional Neural Networks", 2021, arXiv 2011.14214.
    """
    _check_same(first, second)
    return first == second


def flip_probability(predictions: Tensor, step: int) -> Tensor:
    """(N,) share of the T - step pairs of frames `step` apart whose predicted classes differ.

    Its mean over images is the flip probability of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
    Common Corruptions and Perturbations", 2019, arXiv 1903.12261, between frames at a fixed distance (not to the first
    frame), and is what the code of Leterme et al. calls mFR; in percent, lower is better. No baseline
    divides it, as AlexNet's does in ImageNet-P's mFR.

    Args:
        predictions: (N, T) predicted classes, frame by frame.
        step: 1 to T - 1 frames.
    """
    if predictions.ndim != 2 or not 1 <= step < predictions.shape[1]:
        raise ValueError(f"expected predictions (N, T) with T > step >= 1, got {tuple(predictions.shape)}, {step=}")
    return (predictions[:, step:] != predictions[:, :-step]).double().mean(dim=1)


def flip_curve(predictions: Tensor) -> Tensor:
    """(N, T - 1) `flip_probability` at every step from 1 to T - 1."""
    return torch.stack([flip_probability(predictions, step) for step in range(1, predictions.shape[1])], dim=1)


def kl_divergence(reference: Tensor, moved: Tensor) -> Tensor:
    """(N,) Kullback-Leibler divergence KL(p_0 || p_s) = sum_c p_0(c) ln(p_0(c) / p_s(c)), in nats, in float64.

    p = softmax of the logits, p_0 of the image where it was and p_s of the moved one. Taken from the logarithms of the
    softmax, so no probability that rounds to 0 makes it infinite; a class that p_0 excludes by a logit of -inf counts
    nothing. The measure of Leterme et al., arXiv 2209.11740 and 2212.00394; lower is better.

    Args:
        reference, moved: (N, C) logits.
    """
    _check_same(reference, moved)
    before, after = (logits.double().log_softmax(dim=1) for logits in (reference, moved))
    terms = before.exp() * (before - after)
    return torch.where(before.isneginf(), 0.0, terms).sum(dim=1).clamp_min(0)  # below 0 by rounding alone


# --- over images ------------------------------------------------------------------------------------------------------


def resampled_means(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """(S, ...) means over bootstrap samples of N values (N, ...); the same seed and N draw the same images."""
    if len(values) == 0:
        raise ValueError("expected values of at least one image, got none")
    flat = values.reshape(len(values), -1).double()
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // len(flat))
    means = []
    for start in range(0, draws, rows):
        chosen = torch.randint(len(flat), (min(rows, draws - start), len(flat)), generator=generator)
        counts = torch.zeros(chosen.shape, dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones_like(counts))
        means.append(counts @ flat / len(flat))
    return torch.cat(means).reshape(draws, *values.shape[1:])


def bootstrap_interval(values: Tensor, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Mean over images with its percentile bootstrap interval: images are drawn with replacement (Efron 1979).

    It says how much the mean would vary over other images of the same kind. It does not say how much it would vary over
    trainings of the model, and it has no width where all values are equal (100 % of few images).

    Args:
        values: (N, ...) per image; for two models on the same images, the difference (a paired interval).
        confidence: share of the draws between both ends.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")
    means = resampled_means(values, draws, seed)
    return Interval(values.double().mean(dim=0), *percentile_ends(means, confidence))


def percentile_ends(draws: Tensor, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Both ends of the percentile interval of (S, ...) bootstrap draws; those that are NaN are left out."""
    tail = (1 - confidence) / 2
    low, high = torch.nanquantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype), dim=0)
    return low, high


def _check_same(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
