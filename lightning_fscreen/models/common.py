"""Building blocks that the convolutional networks share."""

from __future__ import annotations

from torch import nn


def check_sizes(num_classes: int, in_channels: int) -> None:
    """Raise ValueError unless both are at least 1."""
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def initialize(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out in convolutions (He et al. 2015, arXiv 1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
