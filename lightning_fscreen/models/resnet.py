"""Pre-activation residual networks for CIFAR.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016 (arXiv 1603.05027): batch norm and ReLU come before
every convolution, and nothing but an addition happens to the stream between the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_fscreen.models.common import check_sizes, initialize

_STAGES = (16, 32, 64)


class PreActBlock(nn.Module):
    """BN–ReLU–convolution, two or three times, added to its input.

    Args:
        in_channels: channels of the stream.
        channels: channels inside.
        stride: of the first 3 × 3 convolution.
        bottleneck: 1 × 1, 3 × 3 and 1 × 1 convolutions to four times the channels; otherwise two 3 × 3.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, bottleneck: bool = False) -> None:
        super().__init__()
        out_channels = 4 * channels if bottleneck else channels
        sizes = [(channels, 1), (channels, 3), (out_channels, 1)] if bottleneck else [(channels, 3), (channels, 3)]
        strided = next(index for index, (_, kernel) in enumerate(sizes) if kernel == 3)
        norms, convs = [], []
        width = in_channels
        for index, (size, kernel) in enumerate(sizes):
            norms.append(nn.BatchNorm2d(width))
            step = stride if index == strided else 1
            convs.append(nn.Conv2d(width, size, kernel, step, padding=kernel // 2, bias=False))
            width = size
        self.norms = nn.ModuleList(norms)
        self.convs = nn.ModuleList(convs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, out_channels, H / stride, W / stride)."""
        inner = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            inner = conv(torch.relu(norm(inner)))
        out: Tensor = inner + self.shortcut(x)
        return out


class PreActResNet(nn.Module):
    """A 3 × 3 convolution, three stages of blocks (16, 32, 64 channels), BN–ReLU, mean over positions, linear layer.

    Args:
        blocks: blocks per stage.
        bottleneck: kind of the blocks.
        num_classes: number of logits C.
        in_channels: channels of the images.

    Raises:
        ValueError: num_classes or in_channels below 1.
    """

    def __init__(self, blocks: int, bottleneck: bool, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        width = _STAGES[0]
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        layers = []
        for stage, channels in enumerate(_STAGES):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(PreActBlock(width, channels, stride, bottleneck))
                width = 4 * channels if bottleneck else channels
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, C)."""
        x = torch.relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet164(num_classes: int = 10, in_channels: int = 3) -> PreActResNet:
    """Build ResNet-164: 54 bottleneck blocks, 12,112 batch-norm channels, 1.7 M parameters."""
    return PreActResNet(18, True, num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3) -> PreActResNet:
    """Build ResNet-20: 9 basic blocks, 688 batch-norm channels, 0.27 M parameters."""
    return PreActResNet(3, False, num_classes, in_channels)
