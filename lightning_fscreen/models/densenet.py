"""DenseNet-40 for CIFAR.

Huang et al., "Densely Connected Convolutional Networks", CVPR 2017 (arXiv 1608.06993): every layer reads all features
before it and appends its own; no bottlenecks, no compression.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen.models.common import check_sizes, initialize

_STEM = 24
_LAYERS = 12  # per block


class DenseLayer(nn.Module):
    """BN–ReLU–convolution 3 × 3, appended to its input.

    Args:
        in_channels: features so far.
        growth: features that it adds.
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, in_channels + growth, H, W)."""
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Transition(nn.Module):
    """BN–ReLU–convolution 1 × 1, then means over 2 × 2 positions.

    Args:
        channels: features, as many in as out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → (N, channels, H / 2, W / 2)."""
        return F.avg_pool2d(self.conv(torch.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """Three blocks of 12 layers with transitions between them, BN–ReLU, mean over positions, linear layer.

    Args:
        growth: features that every layer adds.
        num_classes: number of logits C.
        in_channels: channels of the images.

    Raises:
        ValueError: num_classes or in_channels below 1.
    """

    def __init__(self, growth: int = 12, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        width = _STEM
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for block in range(3):
            if block:
                layers.append(Transition(width))
            for _ in range(_LAYERS):
                layers.append(DenseLayer(width, growth))
                width += growth
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, C)."""
        x = torch.relu(self.norm(self.layers(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def densenet40(num_classes: int = 10, in_channels: int = 3) -> DenseNet:
    """Build DenseNet-40 with growth 12: 9,360 batch-norm channels, 1.1 M parameters."""
    return DenseNet(12, num_classes, in_channels)
