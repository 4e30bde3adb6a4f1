"""The command `mixpool demo`, smaller."""

from __future__ import annotations

import re

from PIL import Image

from mixpool.cli import main


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


def test_demo_of_a_small_kernel_says_so(tmp_path, fails):
    message = fails("demo", "--output", tmp_path, "--model", "torchvision/squeezenet1_1")
    assert "5 taps or more" in message and "--pretrained" in message
    assert list(tmp_path.iterdir()) == []
