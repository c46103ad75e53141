"""LeNet-300-100, a fully connected network for handwritten digits.

LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE 86(11), 1998.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LeNet300100(nn.Module):
    """Three fully connected layers, ``in_features → 300 → 100 → num_classes``, with ReLU between them.

    Args:
        num_classes: number of logits C.
        in_features: values per flattened input; 784 = 1 · 28 · 28 fits MNIST, 64 = 1 · 8 · 8 the digits.
        batch_norm: normalise both hidden layers before ReLU; their units are then channels, to be screened and removed.
    """

    def __init__(self, num_classes: int = 10, in_features: int = 784, batch_norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, 300, bias=not batch_norm)
        self.norm1 = nn.BatchNorm1d(300) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(300, 100, bias=not batch_norm)
        self.norm2 = nn.BatchNorm1d(100) if batch_norm else nn.Identity()
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, ...), flattened to (N, in_features), to logits (N, C)."""
        x = torch.flatten(x, 1)
        x = torch.relu(self.norm1(self.fc1(x)))
        x = torch.relu(self.norm2(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits


def lenet300_100(num_classes: int = 10, in_features: int = 784, batch_norm: bool = False) -> LeNet300100:
    """Build LeNet-300-100, with 266,610 parameters by default.

    Args:
        num_classes: number of logits C.
        in_features: values per flattened input.
        batch_norm: normalise both hidden layers before ReLU; their units are then channels, to be screened and removed.

    Returns:
        The network, with torch's default initialisation.
    """
    return LeNet300100(num_classes, in_features, batch_norm)
