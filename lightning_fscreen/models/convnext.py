"""A small ConvNeXt for CIFAR.

Liu et al., "A ConvNet for the 2020s", CVPR 2022 (arXiv 2201.03545): depthwise convolutions of 7 × 7, LayerNorm in the
place of batch norms, an inverted bottleneck with GELU, LayerScale. Its hidden units are the outputs of the first linear
layer of every block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen.models.common import check_sizes

_SCALE = 1e-6  # of every block at the start


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of every position."""
        normalised: Tensor = super().forward(x.permute(0, 2, 3, 1))
        return normalised.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution, LayerNorm, ``width → 4 · width → width`` at every position, added to the input.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), _SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) → the same shape."""
        hidden = self.expand(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        change: Tensor = self.scale * self.project(F.gelu(hidden))
        return x + change.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Stages of blocks; between two stages the positions are halved in both directions.

    Args:
        num_classes: number of logits C.
        in_channels: channels of the images.
        widths: channels of every stage.
        depths: blocks of every stage.
        patch: the stem makes one position of so many by so many pixels.

    Raises:
        ValueError: sizes below 1, or not as many depths as widths.
    """

    def __init__(
        self, num_classes: int, in_channels: int, widths: Sequence[int], depths: Sequence[int], patch: int
    ) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        if len(widths) != len(depths) or not widths or min(*widths, *depths, patch) < 1:
            raise ValueError(
                f"widths, depths (one of each per stage) and patch must be at least 1, got {list(widths)}, "
                f"{list(depths)} and {patch}"
            )
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], patch, patch), ChannelNorm(widths[0])]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [Block(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, C)."""
        logits: Tensor = self.head(self.norm(self.features(x).mean((2, 3))))
        return logits


def convnext(
    num_classes: int = 10,
    in_channels: int = 3,
    widths: Sequence[int] = (48, 96, 192),
    depths: Sequence[int] = (2, 2, 2),
    patch: int = 4,
) -> ConvNeXt:
    """Build a small ConvNeXt, with 910,618 parameters by default.

    Args:
        num_classes: number of logits C.
        in_channels: channels of the images.
        widths: channels of every stage.
        depths: blocks of every stage.
        patch: the stem makes one position of so many by so many pixels.

    Returns:
        The network, initialised as in the paper.
    """
    return ConvNeXt(num_classes, in_channels, widths, depths, patch)
