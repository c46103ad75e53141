"""What masks of units cost: parameters or multiply–adds of the network that slimming would leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_fscreen.costs.model import CostModel
from lightning_fscreen.costs.size import Size
from lightning_fscreen.modules import join, named_tensors
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.positions import by_module, positions, products
from lightning_fscreen.slimming.widths import Widths

Currency = Literal["candidates", "params", "macs"]
"""What a budget counts."""


class NetworkCosts:
    """Costs of one captured network in its present size, but for a constant.

    Args:
        network: the network.
        captured: its graph.
        instances: how many it was captured with.
        widths: its widths.
        currency: "params" or "macs".
        size: measured, with names as in the model.
        name: of the network in the model.
    """

    def __init__(
        self,
        network: nn.Module,
        captured: Capture,
        instances: int,
        widths: Widths,
        currency: Currency,
        size: Size,
        name: str = "",
    ) -> None:
        self.widths = widths
        tensors = {tensor: tuple(value.shape) for tensor, value in named_tensors(network).items()}
        dims = dict(self.widths.dims)
        self._counts_biases = currency == "params"
        if currency == "params":
            factors: dict[str, float] = dict.fromkeys((tensor for tensor, _ in network.named_parameters()), 1.0)
        else:  # an auxiliary head runs in train mode alone, and is not measured
            idle = [part for part, _ in network.named_modules() if _is_idle(size, join(name, part))]
            factors = {weight: count / instances for weight, count in positions(captured, idle).items()}
            # The counter of torch does not see all kinds of attention on all devices: what counts is what is measured.
            unseen = [
                part
                for part, macs in by_module(captured).items()
                if not _sees(size, join(name, part), macs / instances)
            ]
            for call, macs in products(captured, [*idle, *unseen]).items():
                if (classes := self.widths.products.get(call)) is not None:
                    tensors[call], dims[call, 0] = (len(classes),), classes
                    factors[call] = macs / len(classes) / instances
        self.model = CostModel(tensors, factors, dims, self.widths.count)
        holders = torch.bincount(self.widths.held[:, 0], minlength=self.widths.count)
        self._shares = 1 / holders.clamp(min=1)
        units = torch.cat(list(self.widths.units.values()))
        self._sharing = torch.bincount(units, minlength=self.widths.count).clamp(min=1)

    def full(self) -> float:
        """Cost of the network as it is."""
        return self.model.of(torch.ones(self.widths.count, dtype=torch.bool))

    def of(self, keep: Mapping[str, Tensor]) -> float:
        """Cost of what slimming would leave; `keep` by names in the network."""
        return self._cost(*self.widths.remaining(keep))

    def priced(self, keep: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The same, and gate → (units,) float64, what each of its units costs beside those that are kept.

        What several channels read without changing it (a channel of a DenseNet's stream) is shared among them. Units
        that would stay, since their constants cannot be carried, cost nothing.
        """
        kept, biases = self.widths.remaining(keep)
        prices = self.model.prices(kept)
        held, holders = self.widths.held.unbind(1)
        prices = prices.index_add(0, holders, (prices * self._shares)[held])
        own = torch.where(self.widths.stuck, 0.0, prices / self._sharing)
        return self._cost(kept, biases), {gate: own[classes] for gate, classes in self.widths.units.items()}

    def _cost(self, kept: Tensor, biases: int) -> float:
        return self.model.of(kept) + (biases if self._counts_biases else 0)


def _is_idle(size: Size, layer: str) -> bool:
    return layer in size.layers and size.layers[layer].macs == 0


def _sees(size: Size, layer: str, macs: float) -> bool:
    own = size.layers.get(layer)
    return own is None or own.macs is None or own.macs >= macs - 1


class UnitCosts:
    """Costs of all networks of a model.

    Args:
        networks: name in the model → costs.
        present: the measured cost of all of them, as they are.
    """

    def __init__(self, networks: Mapping[str, NetworkCosts], present: int) -> None:
        self._networks = networks
        self._rest = present - sum(costs.full() for costs in networks.values())

    def of(self, kept: Mapping[str, Tensor]) -> float:
        """Cost of what slimming would leave; `kept`: layer, by its name in the model → (units,) bool."""
        return self._rest + sum(costs.of(_inside(name, costs, kept)) for name, costs in self._networks.items())

    def priced(self, kept: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The same, and layer → (units,) float64: what each of its units costs beside those that are kept."""
        total, prices = self._rest, dict[str, Tensor]()
        for name, costs in self._networks.items():
            own, found = costs.priced(_inside(name, costs, kept))
            total += own
            prices |= {join(name, gate): each for gate, each in found.items()}
        return total, {layer: prices.get(layer, torch.zeros(len(mask))) for layer, mask in kept.items()}


def _inside(name: str, costs: NetworkCosts, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {gate: kept[join(name, gate)].cpu() for gate in costs.widths.units}
