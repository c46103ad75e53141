"""Widths that are multiples of a number: which slots are in the same widths, and how many of them may be left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Multiples:
    """Blocks: sets of classes that are in the same widths, each equally often. A width is the sum of its blocks.

    Attributes:
        blocks: (classes,) int64, the block of each class.
        steps: (blocks,) int64: if the number of classes that a block keeps is a multiple of it, so are its widths.
    """

    blocks: Tensor
    steps: Tensor

    def filled(self, kept: Tensor) -> Tensor:
        """(classes,) bool: with so many more classes that every block keeps a multiple of its step, or is whole."""
        left = torch.bincount(self.blocks[kept], minlength=len(self.steps))
        lacking = -left % self.steps
        if not bool(lacking.any()):
            return kept
        gone = (~kept).nonzero().flatten()
        gone = gone[self.blocks[gone].argsort(stable=True)]
        filled = kept.clone()
        blocks = self.blocks[gone]
        place = torch.arange(len(gone)) - torch.searchsorted(blocks, blocks)  # in its block
        filled[gone[place < lacking[blocks]]] = True
        return filled


def find_multiples(widths: Iterable[Tensor], count: int, round_to: int) -> Multiples:
    """The blocks of a network.

    A class that is m times in a width (a channel at m positions that were flattened, a head of m channels) makes it a
    multiple of `round_to` with every round_to / gcd(round_to, m) of its kind.

    Args:
        widths: (size,) int64 each, the class of every index of a width.
        count: number of classes; those in no width are a block whose step is 1.
        round_to: number of which widths are to be multiples.
    """
    blocks, next_block = torch.zeros(count, dtype=torch.int64), 1
    steps = torch.ones(count, dtype=torch.int64)  # of classes
    for width in widths:
        classes, times = width.unique(return_counts=True)
        _, refined = torch.stack([blocks[classes], times]).unique(dim=1, return_inverse=True)
        blocks[classes] = next_block + refined
        next_block += int(refined.max()) + 1
        steps[classes] = torch.lcm(steps[classes], round_to // torch.gcd(times, torch.tensor(round_to)))
    _, blocks = blocks.unique(return_inverse=True)
    return Multiples(blocks, torch.ones(int(blocks.max()) + 1, dtype=torch.int64).scatter(0, blocks, steps))
