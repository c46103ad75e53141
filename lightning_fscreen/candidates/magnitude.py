"""The magnitude of units that have no scale of their own, and how units of different layers compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_fscreen.members import Members


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies units.

    Attributes:
        weight: of a linear or convolution layer.
        dim: its dimension over the inputs.
        labels: (inputs,) int64: the unit that each of them carries, numbered as the units are.
    """

    weight: nn.Parameter
    dim: int
    labels: Tensor


def unit_magnitude(members: Members, units: Tensor, readers: Sequence[Reader]) -> Tensor:
    """‖incoming weights‖ · ‖outgoing weights‖ of every unit.

    A network with ReLU computes the same if the incoming weights of a unit are multiplied by any a > 0 and its outgoing
    ones by 1/a; the product stays the same, too, which neither norm does. Of what was compared (see
    `tests/benchmarks/unit_magnitude.py`) nothing that needs no statistics ranks better. Where no dense layer reads the
    units (but a grouped convolution, say), it is the norm of the incoming weights alone.

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
        columns = Members(reader.weight, dim=reader.dim).total(reader.weight.detach().to(incoming).square())
        outgoing.index_add_(0, torch.searchsorted(numbers, reader.labels.to(weight.device)), columns)
    return incoming * outgoing[torch.searchsorted(numbers, units)].sqrt()


def relative(
    magnitudes: Mapping[str, Tensor], kept: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> dict[str, Tensor]:
    """Magnitudes that compare over all layers.

    How large a layer's weights are depends on how many each unit has, and can be moved from one layer to the next
    without any change of what the network computes; so the magnitudes of neurons are divided by the mean over their
    layer. The scales of batch norms compare as they are: they are divided by the mean over all of them. They are left
    alone where there are no neurons to compare them with.

    Args:
        magnitudes: layer → (units,).
        kept: layer → (units,) bool; the means are over those that are left.
        kinds: layer → "channel" or "neuron".
    """
    if set(kinds.values()) <= {"channel"}:
        return dict(magnitudes)
    channels = [name for name, kind in kinds.items() if kind == "channel"]
    groups = [*([name] for name in kinds if name not in channels), *([channels] if channels else [])]
    result = dict(magnitudes)
    for names in groups:
        left = torch.cat([magnitudes[name][kept[name]].abs() for name in names])
        mean = left.double().mean() if len(left) else left.new_zeros((), dtype=torch.float64)
        for name in names:
            result[name] = magnitudes[name] / torch.where(mean > 0, mean, 1.0).to(magnitudes[name])
    return result
