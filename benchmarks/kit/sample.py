"""The real photos and the real classifier of the shared folder, for the measurements that need them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.kit.store import ROOT

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 227  # SqueezeNet's input
MARGIN = 12  # pixels kept on every side, so that a crop can be shifted


def shared_folder() -> Path:
    """`../shared` beside the repository, or $MIXPOOL_SHARED."""
    folder = Path(os.environ.get("MIXPOOL_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        raise SystemExit(f"this measurement needs the shared data, not found in {folder}; set MIXPOOL_SHARED")
    return folder


def squeezenet() -> nn.Module:
    """SqueezeNet 1.0 with ImageNet weights, in evaluation mode: conv 7x7/2 -> ReLU -> max pool 3x3/2."""
    model = torchvision.models.squeezenet1_0()
    model.load_state_dict(load_file(shared_folder() / "data/squeezenet/squeezenet1_0_imagenet.safetensors"))
    model.classifier[1].padding = (1, 1)
    return model.eval()


def photos() -> tuple[Tensor, Tensor]:
    """The 500 photos, (500, 3, 251, 251) normalised with a margin of 12, and their classes."""
    folder = shared_folder() / "data/imagenet_sample"
    synsets = [line.split()[0] for line in (folder / "synsets.txt").read_text().splitlines() if line.strip()]
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(256),
            v2.CenterCrop(CROP + 2 * MARGIN),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    files = torchvision.datasets.ImageFolder(str(folder / "val"), transform=transform)
    images = torch.stack([image for image, _ in files])
    return images, torch.tensor([synsets.index(files.classes[label]) for _, label in files.samples])


def shifted(images: Tensor, dy: int = 0, dx: int = 0) -> Tensor:
    """The 227 x 227 crop, its window moved by (dy, dx) pixels."""
    return images[:, :, MARGIN + dy : MARGIN + dy + CROP, MARGIN + dx : MARGIN + dx + CROP].contiguous()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs, in batches of 50."""
    return torch.cat([model(batch) for batch in images.split(50)])


def split(seed: int, num_calibration: int = 100, num_images: int = 500) -> tuple[Tensor, Tensor]:
    """Indices of the calibration photos and of the others, drawn by a seed."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order[:num_calibration], order[num_calibration:]


def difference_interval(a: Tensor, b: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of a - b over images, in percent (paired)."""
    difference = (a.double() - b.double()) * 100
    chosen = torch.randint(len(difference), (draws, len(difference)), generator=torch.Generator().manual_seed(0))
    means = difference[chosen].mean(dim=1)
    return means.quantile(0.025).item(), means.quantile(0.975).item()
