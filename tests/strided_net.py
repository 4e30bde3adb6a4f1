"""A small classifier that decimates in every way that a stabilization treats, with running statistics of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixpool.stabilization.pictures import MARGIN

SIZE = 32
TREATED = {"pool": "maxima, then low-pass", "down": "low-pass before", "side": "low-pass before"}


class StridedNet(nn.Module):
    """conv7/2 - norm - relu - pool3/2, a strided block with a strided 1x1 shortcut, a convolution, a linear layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.down, self.norm1 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.second, self.norm2 = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.side = nn.Conv2d(8, 12, 1, 2)
        self.last, self.head = nn.Conv2d(12, 10, 3, 1, 1), nn.Linear(10, classes)
        nn.init.normal_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        y = self.norm2(self.second(F.relu(self.norm1(self.down(x)))))
        y = F.relu(y + self.side(x))
        return self.head(self.last(y).relu().mean(dim=(2, 3)))


def images(count: int = 16, seed: int = 3) -> Tensor:
    """Textures with the margin that shifted crops need."""
    generator = torch.Generator().manual_seed(seed)
    side = (SIZE + MARGIN) // 2
    noise = torch.randn(count, 3, side, side, generator=generator)
    return F.interpolate(noise, scale_factor=2, mode="bilinear") + torch.randn(count, 3, 1, 1, generator=generator) / 2


@torch.no_grad()
def trained(model: nn.Module | None = None, seed: int = 1) -> nn.Module:
    """Random weights with the running statistics of the images above, as after a training; evaluation mode."""
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = StridedNet()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()(images(16, seed=5))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
