"""Channels of batch norms as candidates: their scales, their activation functions, and which go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen.candidates.weights import require_candidates, select
from lightning_fscreen.slimming.activations import Activation
from lightning_fscreen.slimming.gates import STAYS, Gate, fixed_reasons
from lightning_fscreen.statistics.collector import Probe

Feature = Literal["activation", "activation_square", "output", "output_square"]
FEATURES: tuple[Feature, ...] = get_args(Feature)
_GRID = 1000  # points on either side, per search for the shift that an activation turns into a given value
_ZOOMS = 4
_REACH = 30.0


@dataclass(frozen=True)
class PrunableChannels:
    """The channels of one batch norm.

    Attributes:
        name: name of the batch norm in the model.
        module: the batch norm.
        units: (channels,) int64, equal for channels that are pruned together, -1 where one has to stay.
        activation: the element-wise function that follows it; None if there is none, or more than one reader.
    """

    name: str
    module: nn.Module
    units: Tensor
    activation: Activation | None = None

    @property
    def scale(self) -> nn.Parameter:
        """γ, (channels,)."""
        return self.module.get_parameter("weight")

    @property
    def shift(self) -> nn.Parameter:
        """β, (channels,)."""
        return self.module.get_parameter("bias")

    def probe(self, feature: Feature = "activation") -> Probe:
        """Where its activations are read, for one of `FEATURES`."""
        activation = self.activation if feature.startswith("activation") else None
        return Probe(self.name, self.module, "output", activation, square=feature.endswith("square"))

    @torch.no_grad()
    def set_output(self, values: Tensor, channels: Tensor) -> None:
        """Set β so that the activations of these channels, whose γ is zero, take given values.

        Args:
            values: (channels,).
            channels: (channels,) bool, True for these channels.
        """
        wanted = values.to(self.shift)[channels]
        self.shift[channels] = wanted if self.activation is None else inverse(self.activation, wanted)


def find_channels(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> tuple[list[PrunableChannels], dict[str, str]]:
    """Batch norms of `model` in the order of its modules, before anything is known about how they are connected.

    Args:
        model: any module.
        include: glob patterns over module names; a batch norm must match one. All if None.
        exclude: glob patterns over module names; a batch norm must match none.

    Returns:
        The batch norms whose channels can be pruned, and {name: reason} of those that cannot.

    Raises:
        ValueError: a pattern that matches no batch norm; nothing to prune.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    reasons = select(modules, include, exclude)
    reasons |= {name: reason for name, reason in fixed_reasons(modules).items() if name not in reasons}
    found = [
        PrunableChannels(name, module, torch.arange(int(module.num_features)))
        for name, module in modules.items()
        if name not in reasons
    ]
    require_candidates(found, type(model).__name__, "batch norms", reasons)
    return found, reasons


def refine(
    candidates: Sequence[PrunableChannels], gates: Mapping[str, Gate], activations: Mapping[str, Activation]
) -> tuple[list[PrunableChannels], dict[str, str]]:
    """Add the coupled channels and the activations that a captured network shows.

    Channels that are coupled to a batch norm that is no candidate stay with it.

    Args:
        candidates: from `find_channels`.
        gates: gates of the captured network, by name in the model.
        activations: the activation that follows each gate, by its name in the model.

    Returns:
        The candidates that are left, and {name: reason} of the others.
    """
    named = {candidate.name for candidate in candidates}
    bound = {unit: name for name, gate in gates.items() if name not in named for unit in gate.units}
    left, reasons = [], {}
    for candidate in candidates:
        gate = gates.get(candidate.name)
        if gate is None:
            reasons[candidate.name] = "it is not part of the network that the training step calls"
            continue
        units = [STAYS if unit in bound else unit for unit in gate.units]
        if gate.excluded is not None:
            reasons[candidate.name] = gate.excluded
        elif set(units) == {STAYS}:
            reasons[candidate.name] = f"it is coupled to {bound[gate.units[0]]!r}, which is not pruned"
        else:
            activation = activations.get(candidate.name)
            left.append(replace(candidate, units=torch.tensor(units), activation=activation))
    return left, reasons


def inverse(activation: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Where an element-wise function takes given values, or comes nearest to them; the point closest to zero.

    Args:
        activation: the function.
        values: (n,).

    Returns:
        (n,), of the same dtype.
    """
    wanted = values.double().unsqueeze(1)
    reach = max(_REACH, 2 * float(wanted.abs().max())) if len(values) else _REACH
    centre = torch.zeros_like(wanted)
    points = torch.arange(-_GRID, _GRID + 1, dtype=torch.float64, device=values.device) / _GRID
    points = points[points.abs().argsort(stable=True)]  # the first of equals is the closest to the centre
    for _ in range(_ZOOMS):
        grid = centre + reach * points
        nearest = (activation(grid) - wanted).abs().sort(dim=1, stable=True).indices[:, :1]
        centre = grid.gather(1, nearest)
        reach *= 2 / _GRID
    return centre.squeeze(1).to(values)
