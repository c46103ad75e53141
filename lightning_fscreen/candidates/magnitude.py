"""The magnitude of units that have no scale of their own, and how units of different layers compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fscreen.members import Members


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies units.

    Attributes:
        weight: of a linear or convolution layer, or a buffer.
        dim: its dimension over the inputs.
        labels: (inputs,) int64: the unit that each of them carries, numbered as the units are.
        uses: how often a pass uses it.
    """

    weight: Tensor
    dim: int
    labels: Tensor
    uses: int = 1


def unit_magnitude(members: Members, units: Tensor, readers: Sequence[Reader]) -> Tensor:
    """‖incoming weights‖ · ‖outgoing weights‖ of every unit.

    A network with ReLU computes the same if the incoming weights of a unit are multiplied by any a > 0 and its outgoing
    ones by 1/a; the product stays the same, too, which neither norm does. (Trained networks lose as much accuracy by
    one as by the others: `tests/benchmarks/unit_magnitude.py`.) Where no dense layer reads the units (but a grouped
    convolution, say), it is the norm of the incoming weights alone.

    Args:
        members: the weight whose slices belong to the units.
        units: (units,) int64, their numbers; equal ones share what they lead to.
        readers: the weights that multiply them.

    Returns:
        (units,), at least float32.
    """
    weight = members.weight.detach()
    incoming = members.norm(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    if not readers:
        return incoming
    units = units.to(weight.device)
    numbers = torch.cat([units, *(reader.labels.to(weight.device) for reader in readers)]).unique()
    outgoing = incoming.new_zeros(len(numbers))
    for reader in readers:
        squares = reader.weight.detach().to(incoming).square()
        columns = squares.sum([dim for dim in range(squares.ndim) if dim != reader.dim])
        outgoing.index_add_(0, torch.searchsorted(numbers, reader.labels.to(weight.device)), columns)
    return incoming * outgoing[torch.searchsorted(numbers, units)].sqrt()


def comparable(
    magnitudes: Mapping[str, Tensor], kept: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> dict[str, Tensor]:
    """Magnitudes that compare over layers of all kinds: ranks within the layer, from 0 to 1.

    How large a layer's weights are depends on how many each unit has, and can be moved from one layer to the next
    without any change of what the network computes. So a neuron counts by the share of the units left in its layer that
    are not larger: ranked by magnitude, every layer loses the same share. Divided by the mean of their layer or by what
    is left of it (LAMP, arXiv 2010.07611) magnitudes pruned no better, and at times left a layer with next to nothing
    (`tests/benchmarks/unit_magnitude.py`). The scales of batch norms compare with each other, so that their ranks are
    those among all of them; where there is nothing else to compare them with, they are left as they are.

    Args:
        magnitudes: layer → (units,).
        kept: layer → (units,) bool; only those count.
        kinds: layer → "channel" or "neuron".
    """
    channels = [name for name, kind in kinds.items() if kind == "channel"]
    if len(channels) == len(kinds):
        return dict(magnitudes)
    result = dict(magnitudes)
    for names in [*([name] for name in kinds if name not in channels), *([channels] if channels else [])]:
        left = torch.cat([magnitudes[name][kept[name]].abs() for name in names]).sort().values
        for name in names:
            not_larger = torch.searchsorted(left, magnitudes[name].abs().contiguous(), right=True)
            result[name] = not_larger.to(torch.float32) / max(len(left), 1)
    return result
