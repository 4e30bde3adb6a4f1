"""The command `mixpool demo`, smaller."""

from __future__ import annotations

import re

import timm
import tiny_models  # noqa: F401  the small network of these tests, in timm's registry
import torch
from PIL import Image
from safetensors.torch import save_file

import mixpool
from mixpool.cli import main
from mixpool.filters.gabor import gabor_bank


def test_demo_measures_and_draws(tmp_path, monkeypatch, capsys):
    from mixpool.evaluation import demo

    monkeypatch.setattr(demo, "SIZE", 96)  # as the real one, smaller
    assert main(["demo", "--output", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    with Image.open(tmp_path / "new" / "demo.png") as image:
        assert image.width == 1600
    rows = re.findall(r"^  (\S.*?)\s{2,}([\d. ]+)$", out, flags=re.MULTILINE)
    assert [name for name, _ in rows] == 2 * list(demo.POOLINGS)
    at_one_pixel = {name: float(values.split()[0]) for name, values in rows[:4]}
    # The claim of the picture: the swapped channels move least under mixpool, most under max pooling.
    assert at_one_pixel["mixpool"] < 0.75 * min(at_one_pixel[name] for name in ("BlurPool", "CMod (no blur)"))
    assert at_one_pixel["max pooling"] == max(at_one_pixel.values())
    assert all(0 < float(value) < 1.5 for _, values in rows for value in values.split())
    assert "stabilized" not in out and [path.name for path in (tmp_path / "new").iterdir()] == ["demo.png"]


def test_demo_of_a_small_kernel_says_so(tmp_path, fails):
    message = fails("demo", "--output", tmp_path, "--model", "torchvision/squeezenet1_1")
    assert "5 taps or more" in message and "--pretrained" in message
    assert list(tmp_path.iterdir()) == []


def test_a_trained_classifier_is_shown_before_and_after_stabilize(tmp_path, monkeypatch, capsys, fails):
    from mixpool.evaluation import demo
    from mixpool.stabilization import pictures

    monkeypatch.setattr(demo, "SIZE", 96)
    monkeypatch.setattr(pictures, "NUM_SYNTHETIC", 24)
    torch.manual_seed(0)
    model = timm.create_model("tiny_stock").eval()
    model.conv.weight.data.copy_(gabor_bank(8, 3, 5))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    arguments = ["demo", "--output", tmp_path / "new", "--model", "tiny_stock", "--checkpoint"]
    assert main([str(argument) for argument in [*arguments, tmp_path / "weights.safetensors"]]) == 0
    out = capsys.readouterr().out
    assert "The whole of tiny_stock, stabilized" in out and "1 of 2 decimating layers low-passed" in out
    flips, kl = (
        re.search(rf"  {name} +([\d.]+) -> ([\d.]+)\n", out).groups() for name in ("flips of the class, %", "KL")
    )
    assert all(0 <= float(value) <= 100 for value in flips) and float(kl[1]) <= float(kl[0])
    assert (tmp_path / "new" / "demo.png").exists()

    mixpool.stabilize(model, torch.randn(8, 3, 40, 40), repair=None)
    mixpool.save_stabilized(model, tmp_path / "steady.safetensors")
    assert "steady.safetensors is a stabilized network" in fails(*arguments, tmp_path / "steady.safetensors")
    assert "no.pth does not exist" in fails(*arguments, tmp_path / "no.pth")
    assert "got both" in fails(*arguments, tmp_path / "weights.safetensors", "--pretrained")
    assert "--checkpoint needs --model" in fails("demo", "--checkpoint", tmp_path / "weights.safetensors")
