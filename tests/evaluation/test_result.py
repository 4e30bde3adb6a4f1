"""The result of an evaluation: its record, and differences of pairs of images."""

from __future__ import annotations

import json

import pytest
import torch
from known_classifiers import ALL, SIZE, Lopsided, MeanColor, noise, run

from mixpool import records
from mixpool.evaluation.dataset import Images
from mixpool.evaluation.result import difference_record, paired_difference


def test_the_record_goes_through_a_file(tmp_path):
    result = run(Lopsided(), noise(5), *ALL)
    record = result.as_record(model="mine", dataset="noise")
    records.write(tmp_path / "e.jsonl", [record])
    (read,) = records.read(tmp_path / "e.jsonl")
    assert read == json.loads(json.dumps(record)) and read["kind"] == "evaluation" and read["model"] == "mine"
    assert read["summary"].keys() == read["ci95"].keys() == read["units"].keys()
    assert read["settings"]["size"] == SIZE and read["settings"]["num_classes"] == 3
    assert read["speed"]["frames"] == 5 * (1 + 1 + 2 + 2 + 2 + 25 + 49)
    low, high = read["ci95"]["kl"]["vertical"]["0.5"]
    assert low <= read["summary"]["kl"]["vertical"]["0.5"] <= high
    assert read["units"]["kl"] == "nats" and read["units"]["flip_probability"] == "%"


def test_paired_differences_are_over_the_common_images():
    images = noise(12)
    first = run(Lopsided(), images, "flips", "circular")
    second = run(MeanColor(), Images(images, limit=6), "flips", "consistency")
    difference = paired_difference(first, second)
    assert list(difference) == ["flip_probability"]
    rows = second.indices
    expected = (second.values["flip_probability"] - first.values["flip_probability"][rows]).mean(dim=0) * 100
    torch.testing.assert_close(difference["flip_probability"].mean, expected)
    record = difference_record(first, second)
    assert record["summary"]["flip_probability"]["vertical"]["3"] == pytest.approx(expected[1, 2].item())
    same = paired_difference(first, first)["circular_consistency"]
    assert same.low == same.high == 0
    others = run(MeanColor(), noise(12), "circular")
    with pytest.raises(ValueError, match="same dataset, but image 0 and 11 more of the 12 with equal numbers are diff"):
        paired_difference(first, others)
    with pytest.raises(ValueError, match="same seed"):
        paired_difference(first, run(Lopsided(), images, "flips", seed=2))
