"""`evaluate` on models whose answers are known in closed form."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from known_classifiers import ALL, PLAIN, SIZE, Lopsided, MeanColor, Parity, line, noise, run, small_model
from PIL import Image
from torch import nn

from mixpool import convert
from mixpool.evaluation.dataset import Images, Stream
from mixpool.evaluation.evaluate import DEFAULT, evaluate
from mixpool.evaluation.protocols import Consistency, ModelInput, Place
from mixpool.evaluation.result import METRICS, paired_difference


class OnePixel(nn.Module):
    """Two logits, the pixel (16, 16) in red and 0."""

    def forward(self, x):
        return torch.stack([x[:, 0, 16, 16], torch.zeros(len(x), device=x.device)], dim=1)


# --- known answers ----------------------------------------------------------------------------------------------------


def test_flips_of_a_model_of_known_answers():
    # Pictures of 40 x 40 pass the resize to 32 + 8 as they are.
    images = [(line(column, 40), 0) for column in (12, 25, None)]
    result = run(Parity(), images, "flips")
    flips = result.values["flip_probability"]
    odd_steps = torch.tensor([1.0, 0] * 4).double()
    for row in (0, 1):
        assert torch.equal(flips[row], torch.stack([odd_steps, 0 * odd_steps, odd_steps]))
    assert flips[2].count_nonzero() == 0
    curve = result.summary()["flip_probability"]["diagonal"]
    assert list(curve) == [str(k) for k in range(1, 9)]
    assert list(curve.values()) == pytest.approx([200 / 3, 0] * 4)


# Pictures that pass the resize to 64 + 32, or to 32 + 4, as they are.
@pytest.mark.parametrize(("size", "side"), [(64, 96), (32, 36)])
def test_consistency_of_a_model_of_known_answers(size, side):
    images = [(line(size, side), 0) for _ in range(40)]
    protocol = Consistency(size)
    offsets = np.stack([protocol.offsets(Place(i, i), 5) for i in range(40)])  # (40, 2, 2)
    # The column leaves the crop where that starts at column 0, and an empty crop is of class 0.
    classes = np.where(offsets[:, :, 1] == 0, 0, (size - offsets[:, :, 1]) % 2)
    expected = classes[:, 0] == classes[:, 1]
    assert 5 < expected.sum() < 35 and (offsets[:, :, 1] == 0).any()
    result = run(Parity(), images, "consistency", seed=5, model_input=replace(PLAIN, size=size))
    assert result.values["shift_consistency"].tolist() == expected.tolist()
    assert result.summary()["shift_consistency"] == pytest.approx(100 * expected.mean())
    assert result.settings["margin"] == side - size


@pytest.mark.parametrize(("size", "side"), [(64, 96), (32, 36)])
def test_circular_consistency_of_a_model_of_known_answers(size, side):
    images = [(line(side // 2, side), 0) for _ in range(40)]
    same = run(Parity(), images, "circular", model_input=replace(PLAIN, size=size)).values["circular_consistency"]
    draws = [np.random.SeedSequence((0, 3, i)).generate_state(4) for i in range(40)]
    assert same.tolist() == [(int(draw[1]) - int(draw[3])) % 2 == 0 for draw in draws]


def test_a_model_of_the_mean_alone_is_circularly_consistent():
    result = run(MeanColor(), noise(30), "circular")
    assert result.summary() == {"circular_consistency": 100}
    assert run(Parity(), noise(30), "circular").summary()["circular_consistency"] < 100, "the test can fail"


def test_kl_of_a_model_that_sees_no_position_is_zero():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, -2, 3]]).repeat(len(x), 1)

    assert run(Constant(), noise(3), "kl").values["kl"].abs().max() == 0


def test_kl_of_a_ramp_in_closed_form():
    # Column x has the value 2x. Halved from offset j on, column i has 2 (2i + j + 1/2), since the filter is symmetric.
    side = 2 * (SIZE + 8)
    ramp = np.repeat(np.uint8(2 * np.arange(side))[None, :, None], side, axis=0).repeat(3, axis=2)
    wanted = ModelInput(size=SIZE, mean=(0.2,) * 3, std=(0.1,) * 3)
    result = run(OnePixel(), [(Image.fromarray(ramp), 0)], "kl", model_input=wanted)

    def probabilities(j):
        logit = ((2 * (2 * 16 + j) + 1) / 255 - 0.2) / 0.1
        return 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))

    def kl(j):
        return sum(p * math.log(p / q) for p, q in zip(probabilities(0), probabilities(j)))

    (values,) = result.values.values()
    expected = [kl(j) for j in range(1, 17)]
    assert values[0, 0].tolist() == pytest.approx(expected, rel=1e-4)  # float32 logits
    assert values[0, 2].tolist() == pytest.approx(expected, rel=1e-4)
    assert values[0, 1].abs().max() == 0


def test_accuracy_of_known_labels():
    images = [(line(column, SIZE), label) for column, label in ((4, 0), (5, 0), (6, 0), (7, 1))]
    result = run(Parity(), images, "accuracy", "accuracy-wcnn")
    assert result.values["top1"].tolist() == [1, 0, 1, 1]
    assert result.summary() == {"top1": 75, "top1_wcnn": 75}
    low, high = result.as_record()["ci95"]["top1"]
    assert low == 25 and high == 100


# --- independence -----------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_batch_size_and_workers():
    images = noise(19)
    first = run(Lopsided(), images, *ALL, batch_size=19)
    second = run(Lopsided(), images, *ALL, batch_size=4, workers=2)
    assert first.values.keys() == second.values.keys() and len(first.values) == 7
    for name, values in first.values.items():
        torch.testing.assert_close(second.values[name], values, rtol=1e-5, atol=1e-7)
        assert values.std(dim=0).max() > 0 or name.startswith("top"), name
    other = run(Lopsided(), images, "consistency", "circular", seed=1)
    assert any(not torch.equal(other.values[name], first.values[name]) for name in other.values)


def test_a_limit_does_not_change_the_shifts_of_an_image():
    images = noise(20)
    whole = run(Lopsided(), images, "consistency")
    part = run(Lopsided(), Images(images, limit=7), "consistency")
    assert part.indices.tolist() == [1, 4, 7, 10, 12, 15, 18] and part.num_found == 20
    assert torch.equal(part.values["shift_consistency"], whole.values["shift_consistency"][part.indices])


def test_a_stream_gives_what_a_dataset_gives():
    images = noise(11)
    whole, stream = run(Lopsided(), images, *ALL), run(Lopsided(), Stream(images), *ALL, workers=2, batch_size=3)
    for name, values in whole.values.items():
        torch.testing.assert_close(stream.values[name], values, rtol=1e-5, atol=1e-7)
    assert stream.num_found == 11 and run(Lopsided(), Stream(images, limit=4), "flips").num_found is None


# --- the model comes back as it was -----------------------------------------------------------------------------------


def test_stock_and_converted_models_on_all_protocols_of_the_default():
    model = small_model().eval()
    images = [(image, label) for image, label in noise(3)]
    stock = run(model, images, *DEFAULT, model_input=ModelInput(size=64))
    convert(model, select="all")
    mixed = run(model, images, *DEFAULT, model_input=ModelInput(size=64))
    assert list(stock.summary()) == list(mixed.summary())
    assert set(stock.summary()) <= METRICS.keys() and "stem_change" in stock.summary()
    assert stock.notes[-1] == "stem: conv1 -> bn1 -> act1 -> maxpool" and "MixPoolStem" in mixed.notes[-1]
    assert stock.speed.num_frames == 3 * (1 + 2 + 2 + 25 + 49)
    changes = [result.summary()["stem_change"]["horizontal"]["1"] for result in (stock, mixed)]
    assert 0 < changes[1] < changes[0]
    difference = paired_difference(stock, mixed)["stem_change"]
    assert difference.mean[0, 0].item() == pytest.approx(changes[1] - changes[0]) and difference.high[0, 0] < 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


def damaged():
    return [(line(4, 40), 0), (None, 0), (line(5, 40), 1), (None, 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read(workers):
    with pytest.raises(ValueError, match=r"cannot use image 1 of the dataset: expected a PIL image, got NoneType"):
        run(Parity(), damaged(), "flips", workers=workers, batch_size=2)
    result = run(Parity(), damaged(), "flips", workers=workers, on_error="skip", batch_size=1)
    assert result.indices.tolist() == [0, 2] and len(result.values["flip_probability"]) == 2
    assert [name for name, _ in result.failed] == ["image 1", "image 3"]
    record = result.as_record()
    assert (record["num_images"], record["num_found"], len(record["failed"])) == (2, 4, 2)


def test_what_the_reader_left_out_counts_as_failed():
    images = Images(noise(2), left_out=[("x.webp", "no")])
    with pytest.raises(ValueError, match="cannot use x.webp of the dataset: no"):
        run(Parity(), images, "flips")
    assert run(Parity(), images, "flips", on_error="skip").failed == (("x.webp", "no"),)


def test_no_image_at_all():
    with pytest.raises(ValueError, match="found none"):
        run(Parity(), [], "flips")
    with pytest.raises(ValueError, match="found none"):
        run(Parity(), Stream([]), "flips")
    with pytest.raises(ValueError, match="no image of the dataset can be used; image 0: "):
        run(Parity(), [(None, 0)], "flips", on_error="skip")


def test_labels_count_for_accuracy_alone():
    images = [(line(3, 40), 99)]
    assert run(Parity(), images, "flips").num_images == 1
    with pytest.raises(ValueError, match="image 0 has the label 99, the model has classes 0 to 1; without labels"):
        run(Parity(), images, "accuracy")
    assert "not checked" in run(Parity(), noise(2), "accuracy").notes[0]
    assert run(Parity(), Images(noise(2), num_classes=2), "accuracy").notes == ()
    images = Images(noise(2), num_classes=1000)
    with pytest.raises(ValueError, match="numbered from 0 to 999 and the model has 2 outputs"):
        run(Parity(), images, "accuracy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ["flipz"]}, "expected protocols out of accuracy"),
        ({"protocols": "flips"}, "expected protocols"),
        ({"protocols": []}, "expected protocols"),
        ({"on_error": "ignore"}, "raise"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Parity(), noise(1), **{"protocols": ["flips"], "model_input": PLAIN, **options})


def test_a_class_that_is_excluded_for_some_crops_alone():
    """p_0 has it and p_s does not: the divergence is infinite."""

    class Fickle(Parity):
        def forward(self, x):
            is_dark = x.amax(dim=(1, 2, 3)) == 0
            return super().forward(x).masked_fill(is_dark[:, None] & torch.tensor([False, True]), -math.inf)

    images = [*noise(1, 80), (line(0, 80), 0)]
    result = run(Fickle(), images, "kl", on_error="skip")
    assert result.indices.tolist() == [0] and len(result.failed) == 1
    json.dumps(result.as_record(), allow_nan=False)


def test_pictures_that_cannot_be_cropped():
    images = [(line(20, 40), 0), (Image.new("RGB", (0, 5)), 0), (line(21, 40), 1)]
    with pytest.raises(ValueError, match="cannot use image 1 of the dataset: cannot be cropped: .*0 x 5 pixels"):
        run(Parity(), images, "flips")
    for source in (images, Stream(images)):
        result = run(Parity(), source, "accuracy", "flips", on_error="skip")
        assert result.indices.tolist() == [0, 2] and "0 x 5 pixels" in result.failed[0][1]


# --- results ----------------------------------------------------------------------------------------------------------


def test_progress_is_told():
    seen = []

    def track(steps, total):
        seen.append(total)
        for step in steps:
            seen.append(len(step.places))
            yield step

    run(Parity(), noise(5), "circular", batch_size=2, track=track)
    assert seen == [3, 2, 2, 1]
