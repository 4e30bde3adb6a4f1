"""Running a model on images: the batches that come of what a user has, what reaches a module, what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixpool.selection.images import (
    MAX_IMAGES,
    batches_of,
    evaluating,
    first_batches,
    module_inputs,
    outputs_of,
)


def test_batches_of_everything_that_holds_images():
    images, labels = torch.randn(70, 3, 4, 5), torch.arange(70)
    of = {
        "a tensor": images,
        "a list of images": list(images),
        "a list of batches": list(images.split(35)),
        "a data loader": [(images[:50], labels[:50]), [images[50:], labels[50:]]],
        "a generator": (batch for batch in images.split(10)),
    }
    for name, given in of.items():
        batches = list(batches_of(given, 3))
        assert torch.equal(torch.cat(batches), images), name
        assert max(map(len, batches)) <= 32, name
    (batch,) = batches_of(images[0])
    assert torch.equal(batch, images[:1]), "one image"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (7, "expected images as a float tensor .* got 7"),
        (["a.jpg"], r"\(N, C, H, W\), or an iterable of such, got str"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "got torch.uint8"),
        ([torch.zeros(8, 8)], r"got torch.float32 \(8, 8\)"),
        ([[torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]], "got a list of images"),
        (torch.full((1, 3, 8, 8), float("nan")), "finite images"),
    ],
    ids=str,
)
def test_what_is_no_image_is_refused(images, message: str):
    with pytest.raises(ValueError, match=message):
        list(batches_of(images))


def test_channels_are_counted():
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), .* got torch.float32 \(2, 1, 8, 8\)"):
        list(batches_of(torch.zeros(2, 1, 8, 8), 3))
    assert len(list(batches_of(torch.zeros(2, 1, 8, 8)))) == 1


def test_no_more_than_a_sample():
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield torch.full((20, 1, 2, 2), float(asked))

    batches = first_batches(endless())
    assert sum(map(len, batches)) == MAX_IMAGES and asked <= MAX_IMAGES // 20 + 1
    with pytest.raises(ValueError, match="at least one image"):
        first_batches([])


class Net(nn.Module):
    def __init__(self, doubled: bool = False):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.doubled = doubled

    def forward(self, x):
        x = self.conv(2 * x if self.doubled else self.first(x))
        return self.drop(x).mean((2, 3))


def test_every_module_gets_its_mode_back():
    model = Net()
    model.first.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


def test_what_reaches_a_module():
    model, images = Net(doubled=True), torch.randn(3, 3, 6, 6)
    model.drop.register_forward_hook(lambda *_: pytest.fail("nothing runs behind the module"))
    inputs = module_inputs(model, model.conv, [images[:2], images[2:]])
    assert [len(batch) for batch in inputs] == [2, 1] and torch.equal(torch.cat(inputs), 2 * images)
    assert not model.conv._forward_pre_hooks, "the hook is gone"
    with pytest.raises(ValueError, match="once per batch, it did not"):
        module_inputs(Net(), nn.Conv2d(3, 4, 3), [images])


def test_what_comes_out():
    model, images = Net(), torch.randn(5, 3, 6, 6)
    statistics = model.first.running_mean.clone()
    out = outputs_of(model, [images[:2], images[2:]])
    assert torch.equal(model.first.running_mean, statistics) and model.training
    with torch.no_grad():
        torch.testing.assert_close(out, model.eval()(images))
    assert outputs_of(nn.Sequential(nn.Conv2d(3, 4, 3)), [images]) is None, "maps are no logits"
    with pytest.raises(ValueError, match=r"cannot run on the images, a batch of \(5, 3, 2, 2\)"):
        outputs_of(model, [images[..., :2, :2]])
