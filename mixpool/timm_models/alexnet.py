"""AlexNet with timm's model API, which timm itself does not have; torchvision's layers, key names and weights.

Legend: N images, H and W pixels. The later strided layers are the two max pools behind the stem's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import create_aa
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

# (name of the module in `features`, channels, pixels per step) after the activation of every convolution that is
# followed by a max pool, and after the last pool.
TAPS = ((1, 64, 4), (4, 192, 8), (11, 256, 16), (12, 256, 32))
CONVOLUTIONS = (0, 3, 6, 8, 10)  # in `features`
POOLED_SIDE = 6  # positions per side that the hidden layers see, whatever the image's size
HIDDEN = 4096  # features of each of the two hidden layers


class AlexNet(nn.Module):
    """AlexNet of Krizhevsky (2014) as torchvision has it, with the methods that timm's tools expect of a model.

    Its state has torchvision's keys, `features.0.weight` to `classifier.6.bias`.

    Args:
        num_classes: outputs; 0 leaves out the last layer.
        in_chans: channels of the image.
        global_pool: "avg" for the mean over 6 x 6 regions, then the hidden layers; "" for the feature map itself,
            without hidden layers, which wants num_classes=0.
        drop_rate: dropout before each hidden layer.
        aa_layer: class of an anti-aliasing layer (`timm.layers.BlurPool2d`): the two later max pools then run at
            stride 1 and this layer decimates.
        device, dtype: of the parameters.
    Raises:
        ValueError: another `global_pool`, or "" with classes.
    Reference: Krizhevsky, One weird trick for parallelizing convolutional neural networks, 2014, arXiv 1404.5997.
    Example:
        >>> tuple(AlexNet(num_classes=10)(torch.zeros(1, 3, 64, 64)).shape)
        (1, 10)
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.5,
        aa_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}

        def later_pool(channels: int) -> nn.Module:
            if aa_layer is None:
                return nn.MaxPool2d(3, 2)
            return nn.Sequential(nn.MaxPool2d(3, 1), create_aa(aa_layer, channels=channels, stride=2, **place))

        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.grad_checkpointing = False
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 64, 11, 4, 2, **place),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2, **place),
            nn.ReLU(inplace=True),
            later_pool(192),
            nn.Conv2d(192, 384, 3, 1, 1, **place),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, 1, 1, **place),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, 1, 1, **place),
            nn.ReLU(inplace=True),
            later_pool(256),
        )
        self.num_features = 256
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": f"features.{index}"}
            for index, channels, reduction in TAPS
        ]
        self._build_head(num_classes, global_pool, place)

    def _build_head(self, num_classes: int, global_pool: str, place: dict) -> None:
        """Hidden layers and classifier, all of them new."""
        if global_pool not in ("avg", "") or (global_pool == "" and num_classes > 0):
            raise ValueError(
                f'expected global_pool="avg", or "" with num_classes=0, got {global_pool=}, {num_classes=}'
            )
        self.num_classes, self.global_pool = num_classes, global_pool
        if global_pool == "":
            self.avgpool, self.classifier, self.head_hidden_size = nn.Identity(), nn.Identity(), self.num_features
            return
        self.head_hidden_size = HIDDEN
        self.avgpool = nn.AdaptiveAvgPool2d(POOLED_SIDE)
        self.classifier = nn.Sequential(
            nn.Dropout(self.drop_rate),
            nn.Linear(self.num_features * POOLED_SIDE**2, HIDDEN, **place),
            nn.ReLU(inplace=True),
            nn.Dropout(self.drop_rate),
            nn.Linear(HIDDEN, HIDDEN, **place),
            nn.ReLU(inplace=True),
            self._last_layer(num_classes, place),
        )

    @staticmethod
    def _last_layer(num_classes: int, place: dict) -> nn.Module:
        return nn.Linear(HIDDEN, num_classes, **place) if num_classes > 0 else nn.Identity()

    # ------------------------------------------------------------------------------------------------ timm's model API

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 256, H / 32, W / 32) from images (N, in_chans, H, W), at least 63 pixels per side, 79 with BlurPool."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            # From one convolution to the next: the activations overwrite their input, which has to be kept.
            ends = (*CONVOLUTIONS[1:], len(self.features))
            return checkpoint_seq([self.features[a:b] for a, b in zip(CONVOLUTIONS, ends, strict=True)], x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_classes) from the feature map; with `pre_logits` the (N, 4096) features before the last layer."""
        if self.global_pool == "":
            return x
        x = self.avgpool(x).flatten(1)
        return (self.classifier[:-1] if pre_logits else self.classifier)(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of `feature_info`, by timm's arguments; after (last feature map, ...) unless `intermediates_only`.

        `norm` means nothing here, where no norm layer is; ValueError for another `output_fmt` than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f'expected output_fmt="NCHW", got {output_fmt!r}')
        wanted, last = feature_take_indices(len(TAPS), indices)
        stops = {TAPS[i][0] for i in wanted}
        layers = self.features[: TAPS[last][0] + 1] if stop_early else self.features
        maps = []
        for index, layer in enumerate(layers):
            x = layer(x)
            if index in stops:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers behind the last of these feature maps, and the head; returns the maps' numbers."""
        wanted, last = feature_take_indices(len(TAPS), indices)
        self.features = self.features[: TAPS[last][0] + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer, or its name."""
        if name_only:
            return "classifier" if self.global_pool == "" else "classifier.6"
        return self.classifier if self.global_pool == "" else self.classifier[-1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for so many classes (0: none); another `global_pool` renews the hidden layers too."""
        parameter = next(self.features.parameters())
        place = {"device": parameter.device, "dtype": parameter.dtype}
        if global_pool in (None, self.global_pool) and self.global_pool != "":
            self.num_classes = num_classes
            self.classifier[-1] = self._last_layer(num_classes, place)
        else:
            self._build_head(num_classes, self.global_pool if global_pool is None else global_pool, place)
        self.classifier.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute `features` again in the backward pass, convolution by convolution, instead of keeping all outputs."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns by which timm's layer-wise learning rates group the parameters; one group per layer."""
        return {"stem": r"^features\.0", "blocks": r"^features\.(\d+)"}
