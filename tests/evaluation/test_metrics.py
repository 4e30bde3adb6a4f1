"""Metrics against numbers worked by hand."""

import math

import pytest
import torch

from mixpool.evaluation.metrics import (
    bootstrap_interval,
    flip_curve,
    flip_probability,
    kl_divergence,
    percentile_ends,
    resampled_means,
    shift_consistency,
    top_k,
)

# --- one value per image ----------------------------------------------------------------------------------------------


def test_top_k_counts_the_classes_that_score_higher():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]]).repeat(6, 1)
    labels = torch.arange(6)
    assert top_k(logits, labels, 1).tolist() == [True, False, False, False, False, False]
    assert top_k(logits, labels, 5).tolist() == [True] * 5 + [False]
    assert top_k(logits, labels, 6).all()


def test_top_1_is_argmax_also_with_equal_scores():
    logits = torch.randint(3, (200, 7)).float()
    labels = torch.randint(7, (200,))
    assert torch.equal(top_k(logits, labels, 1), logits.argmax(dim=1) == labels)


def test_top_k_of_wrong_arguments():
    with pytest.raises(ValueError, match="k from 1 to the 3 classes, got 5"):
        top_k(torch.rand(2, 3), torch.zeros(2, dtype=torch.long), 5)
    with pytest.raises(ValueError, match="labels from 0 to 2, got 0 to 3"):
        top_k(torch.rand(2, 3), torch.tensor([0, 3]), 1)
    with pytest.raises(ValueError, match="labels from 0 to 2, got -1"):
        top_k(torch.rand(2, 3), torch.tensor([0, -1]), 1)
    with pytest.raises(ValueError, match="expected logits"):
        top_k(torch.rand(2, 3), torch.zeros(3, dtype=torch.long), 1)


def test_shift_consistency():
    assert shift_consistency(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])).tolist() == [True, False, True]


def test_flips_are_counted_over_all_pairs_at_a_distance():
    frames = torch.tensor([[0, 0, 1, 1, 0], [2, 2, 2, 2, 2], [0, 1, 0, 1, 0]])
    assert flip_probability(frames, 1).tolist() == [2 / 4, 0, 1]
    assert flip_probability(frames, 2).tolist() == [2 / 3 + 1 / 3, 0, 0]
    assert flip_probability(frames, 3).tolist() == [0.5, 0, 1]
    assert flip_probability(frames, 4).tolist() == [0, 0, 0]
    assert torch.equal(flip_curve(frames), torch.stack([flip_probability(frames, k) for k in (1, 2, 3, 4)], dim=1))


@pytest.mark.parametrize("step", [0, 5])
def test_flips_of_a_step_out_of_range(step):
    with pytest.raises(ValueError, match="step"):
        flip_probability(torch.zeros(2, 5), step)


def test_kl_of_two_classes():
    p, q = 0.8, 0.3
    first, second = (torch.tensor([[math.log(value), math.log(1 - value)]], dtype=torch.float64) for value in (p, q))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl_divergence(first, second).item() == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(second, first).item() != pytest.approx(expected, rel=0.05), "from p_0, not to it"


def test_kl_stays_finite_where_a_probability_is_zero():
    certain, other = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert kl_divergence(certain, other).item() == pytest.approx(1000)
    assert kl_divergence(certain, certain).item() == 0


def test_kl_of_classes_that_a_model_excludes():
    masked = torch.tensor([[0.3, -math.inf, 1.2]])
    assert kl_divergence(masked, masked - 0.5).item() == pytest.approx(0, abs=1e-9)
    moved = torch.tensor([[1.3, -math.inf, 0.2]])
    expected = kl_divergence(masked[:, [0, 2]], moved[:, [0, 2]]).item()
    assert kl_divergence(masked, moved).item() == pytest.approx(expected) and expected > 0.1
    assert kl_divergence(masked, torch.tensor([[-math.inf, 0.0, 0.0]])).item() == math.inf


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_cover_a_known_mean_as_often_as_they_say():
    """Of 300 experiments of 100 images, 95 % +- 4 standard deviations of that count cover the mean."""
    generator = torch.Generator().manual_seed(1)
    experiments = (torch.rand(100, 300, generator=generator) < 0.3).double()
    # One column per experiment: the same draws of images serve all, which are independent all the same.
    interval = bootstrap_interval(experiments, draws=500)
    covered = ((interval.low <= 0.3) & (interval.high >= 0.3)).double().mean().item()
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / 300) < covered < 0.99
    narrow = bootstrap_interval(experiments, confidence=0.5, draws=500)
    assert ((narrow.low <= 0.3) & (narrow.high >= 0.3)).double().mean().item() < 0.65, "the test can fail"


def test_the_width_of_an_interval_is_that_of_the_mean():
    values = torch.randn(400, dtype=torch.float64)
    interval = bootstrap_interval(values)
    assert interval.mean == values.mean()
    assert (interval.high - interval.low).item() == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)


def test_a_paired_interval_is_narrower():
    hard = torch.rand(300, dtype=torch.float64)
    first, second = hard + 0.01 * torch.randn(300), hard + 0.01 * torch.randn(300)
    paired = bootstrap_interval(second - first)
    width = (paired.high - paired.low).item()
    assert width < 0.2 * (bootstrap_interval(first).high - bootstrap_interval(first).low).item()


def test_resampling_is_seeded_and_takes_whole_images():
    values = torch.rand(50, 3)
    values[:, 1] = 1 - values[:, 0]
    means = resampled_means(values, draws=20, seed=3)
    assert means.shape == (20, 3) and torch.allclose(means[:, 0] + means[:, 1], torch.ones(20).double())
    assert torch.equal(means, resampled_means(values, draws=20, seed=3))
    assert not torch.equal(means, resampled_means(values, draws=20, seed=4))


def test_many_images_are_resampled_in_parts(monkeypatch):
    values = torch.rand(40, 2)
    whole = resampled_means(values, draws=30)
    monkeypatch.setattr("mixpool.evaluation.metrics._CHUNK", 100)
    parts = resampled_means(values, draws=30)
    assert torch.equal(whole, parts)


def test_draws_that_say_nothing_are_left_out():
    draws = torch.linspace(0, 1, 1001, dtype=torch.float64)
    draws = torch.stack([draws, torch.where(draws < 0.5, torch.nan, draws)], dim=1)
    low, high = percentile_ends(draws, 0.9)
    assert low.tolist() == pytest.approx([0.05, 0.525]) and high.tolist() == pytest.approx([0.95, 0.975])


def test_intervals_of_wrong_arguments():
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap_interval(torch.zeros(0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval(torch.rand(3), confidence=95)
