"""The demonstration: how much a stem's output moves when photos move by a few pixels, under four poolings."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixpool.conversion.convert import convert
from mixpool.conversion.find import FoundStem, find_stem
from mixpool.conversion.report import ConversionReport
from mixpool.evaluation.photos import demo_photos, normalize
from mixpool.evaluation.shifts import change_curve, shifted_crop
from mixpool.filters.gabor import gabor_bank
from mixpool.stem.module import MixPoolStem

SIZE = 224  # pixels, side of the crops that the stems see
SHIFTS = (1, 2, 3, 4, 5, 6, 7, 8)
SHOWN = (1, 2, 3, 4, 6, 8)  # in the table
MARGIN = max(SHIFTS)
PICTURE_PHOTO = "chelsea"  # the photo in the picture; the numbers are those of all photos
POOLINGS = ("max pooling", "BlurPool", "CMod (no blur)", "mixpool")


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        report: of the conversion.
        changes: pooling -> (len(SHIFTS), C) change of each channel at each shift; see `evaluation.shifts`.
        photo: (3, SIZE, SIZE) in [0, 1], the photo of the picture.
        channel: the swapped channel of the picture: of those that respond to the photo, the one whose gain is typical.
        kernel: (I, kH, kW) its complex kernel W + iV.
        maps: pooling -> (map, map after one pixel of shift) of that channel, (H_out, W_out).
        num_photos: how many photos were used.
    """

    report: ConversionReport
    changes: dict[str, Tensor]
    photo: Tensor
    channel: int
    kernel: Tensor
    maps: dict[str, tuple[Tensor, Tensor]]
    num_photos: int

    @property
    def is_complex(self) -> Tensor:
        return torch.tensor(self.report.plan.is_complex)

    def mean_change(self, pooling: str, swapped_only: bool = True) -> list[float]:
        """Change at each shift, averaged over the swapped channels or over all; constant channels do not count."""
        changes = self.changes[pooling]
        return (changes[:, self.is_complex] if swapped_only else changes).nanmean(dim=1).tolist()

    def table(self) -> str:
        """The mean changes as text: the swapped channels, then all of them."""
        width = max(len(name) for name in POOLINGS) + 2
        lines = []
        for swapped_only, count in ((True, int(self.is_complex.sum())), (False, len(self.is_complex))):
            head = f"{'swapped' if swapped_only else 'all'} {count}"
            lines.append(f"{head:<{width}}" + "".join(f"{shift:>5} px" for shift in SHOWN))
            for name in POOLINGS:
                values = self.mean_change(name, swapped_only)
                lines.append(f"  {name:<{width}}" + "".join(f"{values[SHIFTS.index(k)]:8.3f}" for k in SHOWN)[2:])
            lines.append("")
        return "\n".join(lines[:-1])


def run_demo(model: nn.Module, *, gabor: bool, track=lambda steps, total: steps) -> DemoResult:
    """Measure the four poolings of a model's stem on the photos of scikit-image; converts the model, in place.

    Args:
        model: a model whose stem `convert` can take over, of RGB input.
        gabor: put a Gabor bank into its first convolution, and the photos' statistics into its norm layer.
        track: wraps the steps of the measurement, (iterable, total), for a progress bar.
    Raises:
        ValueError: the model has no such stem, or no channel of it is swapped.
    """
    names, photos = demo_photos(SIZE + 2 * MARGIN)
    images = normalize(photos)
    model.eval()
    found = find_stem(model)
    if found.blur is not None:
        raise ValueError(f"the demo compares max pooling with others, and this model has a BlurPool at {found.blur}")
    if gabor:
        set_gabor_bank(found, shifted_crop(images, SIZE, 0))
    parts = copy.deepcopy(_parts(found))
    report = convert(model)
    if report.num_complex == 0:
        raise ValueError(
            "no channel of this model's stem is a band-pass filter fast enough to swap: untrained weights?"
        )
    stems = _stems(parts, report, model.get_submodule(found.conv))

    curves = {name: change_curve(stems[name], images, SIZE, SHIFTS) for name in track(POOLINGS, len(POOLINGS))}
    image = images[names.index(PICTURE_PHOTO)][None]
    with torch.no_grad():
        outputs = {
            name: tuple(stems[name](shifted_crop(image, SIZE, shift))[0] for shift in (0, 1))
            for name in ("max pooling", "mixpool")
        }
    channel = _typical_channel(curves, outputs, report)
    return DemoResult(
        report=report,
        changes=curves,
        photo=shifted_crop(photos[names.index(PICTURE_PHOTO)][None], SIZE, 0)[0],
        channel=channel,
        kernel=_complex_kernel(stems["mixpool"], channel),
        maps={name: tuple(maps[channel] for maps in pair) for name, pair in outputs.items()},
        num_photos=len(photos),
    )


@torch.no_grad()
def set_gabor_bank(found: FoundStem, images: Tensor) -> None:
    """Write a Gabor bank into a stem's convolution and the images' mean and variance into its norm layer."""
    conv = found.modules[found.conv]
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.kernel_size[0] < 5 or conv.in_channels != 3:
        raise ValueError(
            f"a Gabor bank needs a square kernel of 5 taps or more on RGB input, got {conv}; show a model with trained "
            "weights instead (--pretrained)"
        )
    conv.weight.copy_(gabor_bank(conv.out_channels, conv.in_channels, conv.kernel_size[0]))
    if conv.bias is not None:
        conv.bias.zero_()
    if found.norm is not None:
        norm = found.modules[found.norm]
        out = conv(images)
        norm.weight.fill_(1)
        norm.bias.zero_()
        norm.running_mean.copy_(out.mean(dim=(0, 2, 3)))
        norm.running_var.copy_(out.var(dim=(0, 2, 3)))


def _parts(found: FoundStem) -> tuple[nn.Module | None, ...]:
    norm = None if found.norm is None else found.modules[found.norm]
    return found.modules[found.conv], norm, found.act_module, found.modules[found.pool]


def _stems(parts: tuple, report: ConversionReport, converted: nn.Module) -> dict[str, nn.Module]:
    """The same stem under each pooling, each with its own copy of the parameters."""
    cmod = ["cmod" if flag else "max" for flag in report.plan.is_complex]
    stems = {
        "max pooling": MixPoolStem(*copy.deepcopy(parts)),
        "BlurPool": MixPoolStem(*copy.deepcopy(parts), pooling="blurpool"),
        "CMod (no blur)": MixPoolStem(*copy.deepcopy(parts), pooling=cmod),
        "mixpool": converted,
    }
    return {name: stems[name].eval() for name in POOLINGS}


def _complex_kernel(stem: MixPoolStem, channel: int) -> Tensor:
    row = stem.structure().complex_index.tolist().index(channel)
    return torch.complex(stem.weight[channel], stem.imaginary_weight()[row]).detach()


def _typical_channel(curves: dict[str, Tensor], outputs: dict[str, tuple], report: ConversionReport) -> int:
    """Of the swapped channels that respond most to the photo, the one whose gain at 1 px is the median of all swapped.

    So the picture shows an ordinary channel, not the best one.
    """
    swapped = torch.tensor(report.plan.is_complex).nonzero()[:, 0]
    gain = (curves["mixpool"][0] / curves["max pooling"][0])[swapped].log()
    response = outputs["max pooling"][0][swapped].std(dim=(1, 2))
    responsive = response >= response.median()
    distance = (gain - gain.nanmedian()).abs().masked_fill(~responsive, torch.inf).nan_to_num(torch.inf)
    return int(swapped[distance.argmin()])
