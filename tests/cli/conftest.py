"""What the tests of the commands share: a small stock checkpoint, photos, and a command that has to fail."""

from __future__ import annotations

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from mixpool.cli import main
from mixpool.filters.gabor import gabor_bank


def build_squeezenet(num_classes=1000):
    model = torchvision.models.squeezenet1_0(num_classes=num_classes).eval()
    model.features[0].weight.data.copy_(gabor_bank(96))
    return model


@pytest.fixture(scope="session")
def gabor_squeezenet():
    """Builds a small stock model whose stem has something to choose from."""
    return build_squeezenet


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "stock.safetensors"
    torch.manual_seed(0)
    save_file(build_squeezenet().state_dict(), path)
    return path


@pytest.fixture
def noise_photos(tmp_path):
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    for i in range(3):
        noise = torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((320, 240)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with exit code 2 and print nothing; its single line on stderr, besides notes."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        *notes, last = err.strip().splitlines()
        assert last.startswith("mixpool: error: ") and all(note.startswith("mixpool: note: ") for note in notes), err
        return last

    return run
