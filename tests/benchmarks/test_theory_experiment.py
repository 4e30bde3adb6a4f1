"""The theory's experiment on images whose answer is known, and what must not change its numbers."""

import functools
import json
import math

import pytest
import torch
from support import assert_close

from benchmarks.kit.dtcwpt import DTCWPT
from benchmarks.theory import experiment as experiments
from benchmarks.theory.experiment import run_experiment, smallest_photo
from benchmarks.theory.tables import summary_rows, summary_text
from benchmarks.theory.translated import translated
from mixpool import records
from mixpool.filters.packets import dtcwpt_filters
from mixpool.selection.compare import PoolingStats

SHIFTS = (0.5, 1, 2)


def texture(n=3, size=64, channels=1):
    """Noise with more of the low frequencies, in [0, 1]."""
    noise = torch.rand(n, channels, size, size)
    return (noise + noise.roll(1, 2) + noise.roll(1, 3)) / 3


def waves(frequency, size, phases=16):
    """Pure waves of one frequency (fy, fx), with phases all around the circle."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = 2 * math.pi * torch.arange(phases)[:, None, None] / phases
    return (0.5 + 0.4 * torch.cos(frequency[0] * y + frequency[1] * x + phase))[:, None]


@pytest.fixture(scope="module")
def experiment():
    torch.manual_seed(0)
    return run_experiment(texture(), depth=2, shifts=SHIFTS)


# --- what is known ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, packet", [(2, 12), (2, 21), (3, 2 * (3 * 8 + 4)), (3, 2 * (2 * 8 + 5) + 1)])
def test_a_pure_wave_does_what_the_theory_says(depth, packet):
    """Packets of small and of large gamma (12 to 21 small; the third has piled-up phases), both signs of fx."""
    theta = dtcwpt_filters(depth).center_frequency[packet]
    found = run_experiment(waves(theta.tolist(), smallest_photo(depth) + 40), depth, shifts=SHIFTS)
    measured = found.measured
    # 3 %: the packets are analytic up to a few thousandths of their energy, and the phases are finitely many.
    margin = (0.004, 0.03)
    assert_close("gap", measured.gap[packet], found.expected_gap[packet], margin)
    assert_close("RMax", measured.instability_max[:, packet], found.expected_change[:, packet], (0.01, 0.03))
    assert measured.instability_blur1[:, packet].max() < 0.02, "the modulus of a wave does not move"
    for name, part in found.parts._asdict().items():
        if name != "blurred":
            assert_close(name, part[packet], found.expected_gap[packet], margin)


def test_the_four_packets_of_that_test_differ():
    gamma = {}
    for depth, packets in ((2, (12, 21)), (3, (56, 43))):
        found = run_experiment(torch.rand(1, 1, 100, 100), depth, shifts=[1])
        assert found.filters.is_analytic()[list(packets)].all()
        gamma |= {(depth, packet): found.expected_gap[packet].item() for packet in packets}
    assert gamma[3, 56] > 0.6 and max(value for key, value in gamma.items() if key != (3, 56)) < 0.15


def test_nothing_moves_at_no_shift(experiment):
    still = run_experiment(texture(1), depth=2, shifts=(0, 1), directions=("horizontal", "diagonal"))
    for values in still.measured[3:]:
        assert values.shape == (4, 32) and (values[[0, 2]] == 0).all() and (values[[1, 3]] > 0).all()
    assert 0 < still.summary()["largest_share_of_bound"] < 1
    assert still.bound[[0, 2]].tolist() == [0, 0] and (still.expected_change[[0, 2]] == 0).all()


def test_rows(experiment):
    assert experiment.measured.instability_max.shape == (9, 32)
    assert [experiment.row("horizontal", 0.5), experiment.row(), experiment.row("diagonal", 2)] == [0, 1, 8]
    # alpha = kappa |u|_1 / 2 with kappa = pi / 2
    assert_close("bound", experiment.bound[[1, 5, 8]], torch.tensor([0.25, 0.5, 1]).double() * math.pi)


def test_half_a_pixel_moves_the_modulus_less_than_one(experiment):
    kept = experiment.filters.is_analytic()
    for values in (experiment.measured.instability_blur1, experiment.measured.instability_blur3):
        for direction in experiment.directions:
            half, one = (values[experiment.row(direction, shift), kept] for shift in (0.5, 1))
            assert (half < 0.95 * one).all()


def test_the_modulus_stays_below_its_bound(experiment):
    kept = experiment.filters.is_analytic()
    assert (experiment.measured.instability_blur1[:, kept] <= experiment.bound[:, None]).all()
    assert experiment.summary()["largest_share_of_bound"] <= 1


# --- what must not matter ---------------------------------------------------------------------------------------------


def assert_same(actual, expected, tolerance=(2e-4, 2e-4)):  # because of float32 maps
    for name, a, e in zip(PoolingStats._fields, actual, expected, strict=True):
        assert_close(name, a, e, tolerance)


def test_transposed_photos_exchange_the_axes():
    """psi_iy(y) psi_ix(x) sees of the transposed photo what psi_ix(y) psi_iy(x) sees of the photo."""
    photos = texture()
    found, other = (
        run_experiment(images, depth=2, shifts=[1], directions=("horizontal", "vertical"))
        for images in (photos, photos.mT)
    )
    index = torch.arange(32).reshape(4, 4, 2).transpose(0, 1).flatten()
    rows = [1, 0]
    assert_same(
        [value[..., index][rows] if value.ndim == 2 else value[index] for value in other.measured], found.measured
    )


def test_contrast_and_brightness_do_not_matter_to_analytic_packets(experiment):
    torch.manual_seed(0)
    dim = run_experiment(0.25 + 0.5 * texture(), depth=2, shifts=SHIFTS)
    kept = experiment.filters.is_analytic()
    assert_same([v[..., kept] for v in dim.measured], [v[..., kept] for v in experiment.measured])


def test_colour_counts_by_its_luminance():
    red, gray = torch.zeros(1, 3, 64, 64), texture(1)
    red[:, :1] = gray
    found = run_experiment(red, depth=2, shifts=[1])
    assert_same(found.measured, run_experiment(gray, depth=2, shifts=[1]).measured)
    mixed = torch.rand(1, 3, 64, 64)
    luminance = 0.299 * mixed[:, :1] + 0.587 * mixed[:, 1:2] + 0.114 * mixed[:, 2:]
    found = run_experiment(mixed, depth=2, shifts=[1])
    assert_same(found.measured, run_experiment(luminance, depth=2, shifts=[1]).measured)


@pytest.mark.parametrize("size", [64, 65, 67, 70])
def test_the_border_does_not_matter(size, monkeypatch):
    """However the transform goes on beyond the crop's border: no position that is looked at sees it."""
    photos = texture(1, size)
    found = run_experiment(photos, depth=2, shifts=SHIFTS)
    monkeypatch.setattr(experiments, "DTCWPT", functools.partial(DTCWPT, padding_mode="circular"))
    assert_same(run_experiment(photos, depth=2, shifts=SHIFTS).measured, found.measured, (1e-12, 1e-12))


# --- images that move -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 3, -2])
@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_translation_by_whole_pixels_is_a_copy(shift, direction):
    image = torch.rand(2, 1, 20, 23, dtype=torch.float64)
    moved = translated(image, shift, direction)
    expected = image
    if direction != "vertical":
        expected = expected.roll(-shift, 3)
    if direction != "horizontal":
        expected = expected.roll(-shift, 2)
    inside = (..., slice(3, -3), slice(3, -3))
    assert_close("moved", moved[inside], expected[inside])


@pytest.mark.parametrize("length", [32, 33])
@pytest.mark.parametrize("shift", [0.5, 1.25, -0.3])
def test_translation_of_a_cosine_is_exact(length, shift):
    """Cosines of the mirrored image: cos(pi k (n + 1/2) / N)."""
    position = torch.arange(length, dtype=torch.float64) + 0.5
    k = torch.arange(length, dtype=torch.float64)[:, None]
    image, expected = (torch.cos(math.pi * k * at / length) for at in (position, position + shift))
    assert_close("moved", translated(image, shift), expected)
    assert_close("moved down", translated(image.mT, shift, "vertical"), expected.mT)


def test_translation_keeps_single_precision_and_unknown_directions_are_errors():
    assert translated(torch.rand(1, 4, 4), 0.5).dtype == torch.float32
    with pytest.raises(ValueError, match="sideways"):
        translated(torch.rand(1, 4, 4), 0.5, "sideways")


# --- records ----------------------------------------------------------------------------------------------------------


def predictor(weight, stride, *, weight_imag):
    assert weight.shape == weight_imag.shape == (32, 1, 29, 29) and stride == 2 and weight.dtype == torch.float32
    kernels = dtcwpt_filters(2).kernels
    assert_close("real", weight[:, 0].double(), kernels.real, (1e-7, 0))
    assert_close("imaginary", weight_imag[:, 0].double(), kernels.imag, (1e-7, 0))
    numbers = torch.linspace(0.1, 0.9, 32, dtype=torch.float64)
    return PoolingStats(*3 * [numbers], *3 * [numbers[None]])


def test_a_record_holds_everything_as_json(tmp_path):
    found = run_experiment(texture(2), depth=2, shifts=SHIFTS, predict=predictor, draws=50)
    record = found.as_record("noise")
    records.write(tmp_path / "theory.jsonl", [record])
    (read,) = records.read(tmp_path / "theory.jsonl")
    json.dumps(read, allow_nan=False)
    assert read["kind"] == "theory" and read["photos"] == "noise" and read["num_photos"] == 2
    assert read["params"] | {"depth": 2, "stride": 2, "shifts": [0.5, 1, 2], "window": 3} == read["params"]
    assert read["num_packets"] == 32 and read["num_analytic"] == sum(read["is_analytic"]) == 8
    for name, values in (("gap", found.measured.gap), ("predicted_gap", found.predicted.gap)):
        assert_close(name, torch.tensor(read[name], dtype=torch.float64), values, (1e-12, 1e-3))
    changes = torch.tensor(read["change_blur3"], dtype=torch.float64)
    assert changes.shape == (3, 3, 32)
    assert_close("changes", changes.flatten(0, 1), found.measured.instability_blur3, (1e-12, 1e-3))
    assert read["summary"]["correlation_predicted_gap"] is not None


def test_intervals_hold_the_value(experiment):
    summary, intervals = experiment.summary(), experiment.intervals
    assert intervals.keys() < summary.keys() and "ratio_blur1_vertical" in intervals
    for name in ("mean_gap", "change_max_horizontal", "ratio_blur3_diagonal"):
        low, high = intervals[name]
        assert low < summary[name] < high and high - low < 0.3 * abs(summary[name])


def test_one_photo_has_no_interval():
    found = run_experiment(texture(1), depth=2, shifts=[1], directions=["horizontal"])
    record = found.as_record("noise")
    assert found.intervals == {} == record["ci95"]
    assert ["mean gap", f"{found.summary()['mean_gap']:.3f}"] in summary_rows([record])
    json.dumps(record, allow_nan=False)


def test_what_is_no_number_is_none_in_a_record():
    found = run_experiment(texture(2), depth=2, shifts=[1])
    found.measured.gap[0] = math.nan
    assert found.as_record("noise")["gap"][0] is None


def test_at_depth_2_gamma_is_one_number_and_correlates_with_nothing(experiment):
    kept = experiment.filters.is_analytic()
    assert experiment.expected_gap[kept].std() < 1e-12
    assert math.isnan(experiment.summary()["correlation_gamma_gap"])
    cells = dict((row[0], row[1]) for row in summary_rows([experiment.as_record("noise")]))
    assert cells["correlation of gamma and gap"] == "-"


def test_the_table_has_a_column_per_record(experiment):
    record = experiment.as_record("noise")
    rows = summary_rows([record, record])
    assert rows[0] == ["", "depth 2", "depth 2"] and all(len(row) == 3 for row in rows)
    cells = dict((row[0], row[1]) for row in rows)
    low, high = experiment.intervals["mean_gap"]
    assert cells["mean gap"] == f"{experiment.summary()['mean_gap']:.3f} ({low:.3f} to {high:.3f})"
    lines = summary_text([record]).splitlines()
    assert len(lines) == len(rows) and len({len(line) for line in lines}) == 1


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": 1}, "depth from 2 to 4, got 1"),
        ({"depth": 5}, "depth from 2 to 4, got 5"),
        ({"photos": torch.rand(64, 64)}, "photos"),
        ({"photos": torch.rand(2, 2, 64, 64)}, "photos"),
        ({"photos": torch.rand(0, 3, 64, 64)}, "photos"),
        ({"photos": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}, "uint8"),
        ({"photos": torch.full((2, 3, 64, 64), 0.5)}, "show something, got 0.5"),
        ({"shifts": [2]}, "1 among them"),
        ({"shifts": [1, -1]}, "at least 0"),
        ({"directions": ["vertical"]}, "first among them"),
        ({"directions": ["horizontal", "sideways"]}, "sideways"),
        ({"wavelet": "haar"}, "q-shift family"),
        ({"photos": torch.rand(1, 1, 100, 34)}, "at least 35 pixels"),
        ({"depth": 3}, "at least 75 pixels .*kernels of 65"),
    ],
)
def test_errors(options, message):
    arguments = {"photos": torch.rand(1, 3, 64, 64), "depth": 2, "shifts": [1]} | options
    with pytest.raises(ValueError, match=message):
        run_experiment(**arguments)


def test_the_smallest_photo_is_large_enough():
    for depth in (2, 3):
        side = smallest_photo(depth, max_shift=1)
        assert run_experiment(torch.rand(1, 1, side, side), depth, shifts=[1]).num_positions == 1
        with pytest.raises(ValueError, match=f"at least {side} pixels"):
            run_experiment(torch.rand(1, 1, side - 1, side), depth, shifts=[1])
