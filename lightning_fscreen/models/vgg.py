"""VGG-16 with batch norm for CIFAR.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015 (arXiv
1409.1556), with a single linear layer behind the convolutions, as in the channel-pruning literature.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_fscreen.models.common import check_sizes, initialize

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of convolution–BN–ReLU with max pooling between them, mean over positions, linear layer.

    Args:
        num_classes: number of logits C.
        in_channels: channels of the images.
        width_mult: every layer has so many times the channels, rounded.

    Raises:
        ValueError: num_classes or in_channels below 1; a width_mult that leaves a layer no channel.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width_mult: float = 1.0) -> None:
        super().__init__()
        check_sizes(num_classes, in_channels)
        stages = [[round(width_mult * size) for size in sizes] for sizes in _STAGES]
        if stages[0][0] < 1:
            least = 1 / _STAGES[0][0]
            raise ValueError(f"width_mult={width_mult:g} leaves the first layer no channel; give {least:g} or more")
        layers: list[nn.Module] = []
        width = in_channels
        for stage, sizes in enumerate(stages):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for size in sizes:
                layers += [
                    nn.Conv2d(width, size, 3, padding=1, bias=False),
                    nn.BatchNorm2d(size),
                    nn.ReLU(inplace=True),
                ]
                width = size
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, C)."""
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits


def vgg16_bn(num_classes: int = 10, in_channels: int = 3, width_mult: float = 1.0) -> VGG:
    """Build VGG-16-BN for CIFAR: 4,224 batch-norm channels and 14.7 M parameters at full width."""
    return VGG(num_classes, in_channels, width_mult)
