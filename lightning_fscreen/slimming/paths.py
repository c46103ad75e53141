"""Connections that lie on no path from an input of a network to an output: whatever they weigh, they do nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_fscreen.modules import named_tensors
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.readers import DenseReader, MeanReader, Reader
from lightning_fscreen.slimming.slots import PINNED

Step = Callable[[Reader, Tensor], tuple[Tensor, Tensor]]
"""A reader, and which classes are there → the classes at its other end, and which of them follow."""


class Paths:
    """How the layers of a network feed each other, after one walk over its graph, for any masks of their weights.

    Where it is not known how values pass through an operator, all of them are taken to come from an input and to reach
    an output.

    Args:
        network: the network.
        captured: its graph.
    """

    def __init__(self, network: nn.Module, captured: Capture) -> None:
        slots = find_slots(network, captured, {})
        _, classes = slots.components().unique(return_inverse=True)
        self._pinned = int(classes[PINNED])
        self._count = 1 + int(classes.max())
        self._readers = [
            replace(reader, inputs=classes[reader.inputs], outputs=classes[reader.outputs]) for reader in slots.readers
        ]
        made = torch.zeros(len(classes), dtype=torch.bool)
        for reader in slots.readers:
            if not isinstance(reader, MeanReader):  # its outputs are its inputs
                made[reader.outputs] = True
        self._given = self._none()  # classes of which a part comes from elsewhere: inputs, tables, masks
        self._given[classes[~made]] = True
        if slots.mixed:
            self._given[classes[torch.cat(slots.mixed)]] = True
        shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(network).items()}
        dense = [reader for reader in slots.readers if isinstance(reader, DenseReader)]
        in_part = {  # of which a call reads some rows
            reader.weight
            for reader in dense
            if shapes[reader.weight][1 - reader.input_dim] != len(reader.outputs)
            or shapes[reader.weight][reader.input_dim] != len(reader.inputs)
        }
        self._weights = {reader.weight for reader in dense} - in_part

    def idle(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The connections that do nothing, or would if they were left.

        A connection does nothing if what it reads is a constant, because no path of connections leads there from an
        input of the network (the bias of what reads it says as much), or if no path leads on to an output.

        Args:
            kept: name of a weight of a linear or convolution layer → bool mask of its shape, True where a connection is
                left; others are all left.

        Returns:
            Name → bool mask of the same shape and on the same device, for those of them that are understood.
        """
        readers = [self._masked(reader, kept) for reader in self._readers]
        fed = self._spread(
            self._given, readers, lambda reader, there: (reader.outputs, reader.feeds(there[reader.inputs]))
        )
        needed = self._none()
        needed[self._pinned] = True
        needed = self._spread(
            needed, readers[::-1], lambda reader, there: (reader.inputs, reader.reads(there[reader.outputs]))
        )
        idle: dict[str, Tensor] = {}
        for reader in readers:
            if isinstance(reader, DenseReader) and reader.weight in self._weights and reader.weight in kept:
                mask = kept[reader.weight]
                busy = needed[reader.outputs].unsqueeze(1) & fed[reader.inputs]
                busy = (busy if reader.input_dim == 1 else busy.T).to(mask.device)
                own = ~busy.view(*busy.shape, *[1] * (mask.ndim - 2)).expand(mask.shape)
                idle[reader.weight] = idle[reader.weight] & own if reader.weight in idle else own
        return idle

    def _masked(self, reader: Reader, kept: Mapping[str, Tensor]) -> Reader:
        if not isinstance(reader, DenseReader) or reader.weight not in self._weights:
            return reader
        if (mask := kept.get(reader.weight)) is None:
            return reader
        mask = mask.movedim(reader.input_dim, 1)
        return replace(reader, nonzero=mask.flatten(2).any(2).cpu() if mask.ndim > 2 else mask.cpu())

    def _none(self) -> Tensor:
        return torch.zeros(self._count, dtype=torch.bool)

    @staticmethod
    def _spread(there: Tensor, readers: Sequence[Reader], step: Step) -> Tensor:
        """From these classes to all that follow from them by the readers, to the fixed point."""
        there, before = there.clone(), -1
        while (count := int(there.sum())) > before:
            before = count
            for reader in readers:
                places, found = step(reader, there)
                there[places[found]] = True
        return there
