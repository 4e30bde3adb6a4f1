"""The measurements behind the choice of channels: they run, on little; the partner and the number that only they have.

Legend: C output channels, I input channels, (kH, kW) kernel.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from one_sided import energies, side_of
from support import assert_close
from torch import nn

from benchmarks.selecting import partner, run
from benchmarks.selecting.partner import hilbert_partner, wrong_side_energy
from benchmarks.selecting.selection import gabor, slow_share
from mixpool import analytic_partner, records
from mixpool.filters.gabor import gabor_bank
from mixpool.filters.spectrum import center_frequency


def test_the_parts_asked_for_are_run(monkeypatch):
    ran = []
    monkeypatch.setattr(run.importlib, "import_module", lambda name: type("M", (), {"main": lambda: ran.append(name)}))
    monkeypatch.setattr(sys, "argv", ["selecting", "prediction", "models"])
    run.main()
    assert ran == ["benchmarks.selecting.prediction", "benchmarks.selecting.models"]
    monkeypatch.setattr(sys, "argv", ["selecting", "predictions"])
    with pytest.raises(SystemExit, match="2"):
        run.main()


# --- the partner ------------------------------------------------------------------------------------------------------


def test_partner_measures_every_partner_with_both_blurs(monkeypatch, tmp_path):
    conv = nn.Conv2d(3, 24, 7, 2)
    conv.weight.data = gabor_bank(24, 3, 7)
    network = nn.Module()
    network.features = nn.Sequential(conv)
    monkeypatch.setattr(partner, "photos", lambda: (torch.randn(2, 3, 48, 48), None))
    monkeypatch.setattr(partner, "shifted", lambda images: images)
    monkeypatch.setattr(partner, "squeezenet", lambda: network)
    monkeypatch.setattr(partner, "RECORDS", tmp_path)
    partner.main()
    found = list(records.read(tmp_path / "partner.jsonl"))
    assert len(found) == 10
    high = {(r["partner"], r["blur"]): r["correlation_with_rmax"]["above_1.2"] for r in found}
    for name in {r["partner"] for r in found}:
        assert high[name, 3] > high[name, 1] > 0.3  # the images are noise


def test_the_image_prior_is_taken_back():
    weight, direction = torch.randn(2, 1, 5, 5), torch.randn(2, 2)
    before = analytic_partner(weight, direction)
    assert not torch.allclose(partner.partner_by_image_prior(weight, direction), before)
    assert torch.equal(analytic_partner(weight, direction), before)


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (4, 9)], ids=str)
def test_hilbert_partner_is_the_cropped_directional_transform(size):
    """By plain sums: V(n) = sum over xi of -i sgn<xi, d> W^(xi) exp(i <xi, n>) on the odd grid."""
    weight = torch.randn(1, 1, *size, dtype=torch.float64)
    direction = torch.tensor([[0.8, 0.3]], dtype=torch.float64)
    axis = 2 * np.pi * np.fft.fftfreq(33)
    fy, fx = (f.ravel() for f in np.meshgrid(axis, axis, indexing="ij"))
    wave = np.exp(-1j * (np.arange(size[0])[:, None, None] * fy + np.arange(size[1])[None, :, None] * fx))
    spectrum = -1j * side_of(fy, fx, direction[0], 33) * np.einsum("yx,yxf->f", weight[0, 0].numpy(), wave)
    expected = np.einsum("f,yxf->yx", spectrum, wave.conj()).real / 33**2
    assert_close("hilbert", hilbert_partner(weight, direction, 33)[0, 0], expected)


def test_hilbert_partner_takes_the_centre_frequency_and_keeps_the_dtype():
    weight = gabor_bank(4, 3, 7)
    found = hilbert_partner(weight)
    assert found.dtype == weight.dtype == torch.float32 and found.shape == weight.shape
    assert torch.equal(found, hilbert_partner(weight, center_frequency(weight)))


def test_wrong_side_energy():
    weight = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    direction = torch.randn(4, 2, dtype=torch.float64)
    partner = torch.randn_like(weight)
    wrong, total = energies(weight, partner, direction)
    assert_close("share", wrong_side_energy(weight, partner, direction), wrong / total)
    real = wrong_side_energy(weight, torch.zeros_like(weight), direction)
    assert_close("real filter", real, torch.full((4,), 0.5))
    mirrored = wrong_side_energy(weight, partner, -direction)
    assert_close("other side", mirrored, 1 - wrong / total)


@pytest.mark.parametrize("size, sigma", [((7, 7), 1.6), ((8, 8), 1.8), ((5, 11), 1.4), ((7, 7), None)], ids=str)
def test_least_squares_partner_is_no_worse_than_the_cropped_hilbert_partner(size, sigma):
    """Of filters without a mean, and (None) of noise."""
    if sigma is None:
        weight, direction = torch.randn(12, 3, *size, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    else:
        parts = [(f, a, p) for f in (0.6, 1.2, 2.4) for a in (0.0, 0.8, 1.6, 2.4) for p in (0.0, math.pi / 2)]
        direction = torch.tensor([(f * math.sin(a), f * math.cos(a)) for f, a, _ in parts], dtype=torch.float64)
        side = max(size)
        rows, columns = (slice((side - n) // 2, (side - n) // 2 + n) for n in size)
        banks = [gabor((f * math.sin(a), f * math.cos(a)), sigma, side, p)[rows, columns] for f, a, p in parts]
        weight = torch.stack(banks)[:, None].double()
    partners = analytic_partner(weight, direction), hilbert_partner(weight, direction)
    share, share_cropped = (wrong_side_energy(weight, v, direction) for v in partners)
    wrong, wrong_cropped = (energies(weight, v, direction)[0] for v in partners)
    # The optimum of the least squares, hence without exception; the shares differ in the total energy as well.
    assert (wrong <= wrong_cropped * (1 + 1e-9)).all()
    assert (share <= share_cropped + 0.005).all()
    assert share.mean() < 0.9 * share_cropped.mean()


# --- a number that orders filters by how they pool --------------------------------------------------------------------


def test_slow_share_by_plain_sums():
    """Share of S |W^|^2 at frequencies whose phase turns by less than pi / 2 per step; S = 1 / (|xi|^2 + 0.02^2)."""
    weight = torch.randn(4, 3, 5, 7, dtype=torch.float64)
    energy = (np.abs(np.fft.fft2(weight.numpy(), s=(65, 65))) ** 2).sum(1)
    axis = 2 * np.pi * np.fft.fftfreq(65)
    energy = energy / (axis[:, None] ** 2 + axis**2 + 0.02**2)
    for stride in ((1, 1), (2, 2), (4, 2)):
        turns = [np.abs(np.angle(np.exp(1j * step * axis))) for step in stride]
        slow = np.hypot(turns[0][:, None], turns[1]) < np.pi / 2
        expected = (energy * slow).sum((1, 2)) / energy.sum((1, 2))
        assert_close(f"stride {stride}", slow_share(weight, stride), expected)
    fast = gabor((1.5, 0.6), 3.5, 21, 0.0)[None, None]
    assert slow_share(torch.ones(1, 1, 7, 7), 2) > 0.99 and slow_share(fast, 2) < 0.01
    assert slow_share(torch.zeros(1, 1, 7, 7), 2) == 0
