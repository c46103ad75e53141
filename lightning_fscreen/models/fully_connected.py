"""Fully connected networks of any widths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between them, ``in_features → hidden → … → num_classes``.

    Args:
        num_classes: number of logits C.
        in_features: values per flattened input.
        hidden: widths of the hidden layers.
    """

    def __init__(self, num_classes: int = 10, in_features: int = 784, hidden: Sequence[int] = (200, 60)) -> None:
        super().__init__()
        widths = [in_features, *hidden, num_classes]
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (N, ...), flattened to (N, in_features), to logits (N, C)."""
        x = torch.flatten(x, 1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits


def mlp(num_classes: int = 10, in_features: int = 784, hidden: Sequence[int] = (200, 60)) -> MLP:
    """Build a fully connected network.

    Args:
        num_classes: number of logits C.
        in_features: values per flattened input.
        hidden: widths of the hidden layers.

    Returns:
        The network, with torch's default initialisation.
    """
    return MLP(num_classes, in_features, hidden)
