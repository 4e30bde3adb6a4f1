"""What a conversion found, decided and did to the model's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mixpool.selection.plan import ChannelPlan
from mixpool.selection.stats import FilterStats


@dataclass(frozen=True)
class Agreement:
    """What the conversion did to the model's outputs on the images, before any training.

    top1: share of images whose first class stayed; kl: mean Kullback-Leibler divergence of the softmax, nats;
    num_images: how many images that is.
    """

    top1: float
    kl: float
    num_images: int


WARN_BELOW = 0.7  # share of images that keep their class; the default on SqueezeNet keeps 0.8 and loses no accuracy


@dataclass(frozen=True, eq=False)
class ConversionReport:
    """What `convert` found, decided and changed; `print` it.

    Attributes:
        stem: the stem's modules by name, in the order of the data.
        plan: the pooling of each channel and why; `plan.poolings` is a tuple of names.
        agreement: how often the converted model still says the same on `images`; None without images.
        notes: what else a user should know.
    """

    stem: str
    plan: ChannelPlan
    agreement: Agreement | None
    notes: tuple[str, ...]

    @property
    def poolings(self) -> tuple[str, ...]:
        return self.plan.poolings

    @property
    def num_complex(self) -> int:
        """How many channels pool by the complex convolution."""
        return self.plan.num_complex

    @property
    def stats(self) -> FilterStats:
        return self.plan.stats

    def __str__(self) -> str:
        lines = [
            f"mixpool stem: {self.stem}",
            f"{self.num_complex} of {len(self.poolings)} channels pool by a modulus: {self.plan.count()}",
        ]
        if self.agreement is not None:
            lines.append(
                f"before any training, on the {self.agreement.num_images} images that measured it: the first class "
                f"stays on {self.agreement.top1:.1%}, mean KL {self.agreement.kl:.3f} nats (others: a little worse)"
            )
            if self.agreement.top1 < WARN_BELOW:
                lines.append("WARNING: the model's outputs changed a lot; fine-tune it, or swap fewer channels")
        elif self.num_complex > 0 and self.plan.fidelity is None:
            lines.append("no images given: the effect on the model's outputs was not measured")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, str(self.plan)])


def agreement_of(before: Tensor, after: Tensor) -> Agreement:
    same = (before.argmax(dim=1) == after.argmax(dim=1)).double().mean().item()
    kl = F.kl_div(after.log_softmax(dim=1), before.log_softmax(dim=1), reduction="batchmean", log_target=True).item()
    return Agreement(same, kl, len(before))
