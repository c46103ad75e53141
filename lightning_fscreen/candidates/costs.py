"""What masks of units cost: parameters, multiply–adds or latency of the network that slimming would leave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_fscreen.costs.model import CostModel
from lightning_fscreen.costs.size import Size
from lightning_fscreen.modules import join, named_tensors
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.positions import by_module, positions, products
from lightning_fscreen.slimming.widths import Widths

Currency = Literal["candidates", "params", "macs", "latency"]
"""What a budget counts."""


class CostOfWidths(Protocol):
    """What a network costs as a function of its widths."""

    def of(self, kept: Tensor) -> float:
        """Cost of what is left; `kept`, (classes,) bool."""
        ...

    def prices(self, kept: Tensor) -> Tensor:
        """(classes,) float64: what one index of every class costs beside what is left."""
        ...


def size_model(
    network: nn.Module,
    captured: Capture,
    instances: int,
    widths: Widths,
    currency: Literal["params", "macs"],
    size: Size,
    name: str = "",
) -> CostModel:
    """Parameters or multiply–adds of one captured network, but for a constant.

    Args:
        network: the network.
        captured: its graph.
        instances: how many it was captured with.
        widths: its widths.
        currency: which of them.
        size: measured, with names as in the model.
        name: of the network in the model.
    """
    tensors = {tensor: tuple(value.shape) for tensor, value in named_tensors(network).items()}
    dims = dict(widths.dims)
    if currency == "params":
        factors: dict[str, float] = dict.fromkeys((tensor for tensor, _ in network.named_parameters()), 1.0)
    else:  # an auxiliary head runs in train mode alone, and is not measured
        parts = [part for part, _ in network.named_modules()]  # by their first names, as they are measured
        idle = [part for part in parts if _is_idle(size, join(name, part))]
        factors = {weight: count / instances for weight, count in positions(captured, idle).items()}
        for weight in [weight for weight, count in factors.items() if math.isnan(count)]:  # it depends on values
            macs = size.layers[join(name, weight.rpartition(".")[0])].macs or 0
            factors[weight] = macs / math.prod(tensors[weight])
        for weight in factors.keys() & widths.products.keys():  # once for every head
            dims[weight, len(tensors[weight])] = widths.products[weight]
        # The counter of torch does not see all kinds of attention on all devices: what counts is what is measured.
        done = by_module(captured)
        unseen = [part for part in parts if not _sees(size, join(name, part), done.get(part, 0) / instances)]
        for call, count in products(captured, [*idle, *unseen]).items():
            if (classes := widths.products.get(call)) is not None and not math.isnan(count):
                tensors[call], dims[call, 0] = (len(classes),), classes
                factors[call] = count / len(classes) / instances
    return CostModel(tensors, factors, dims, widths.count)


def _is_idle(size: Size, layer: str) -> bool:
    return layer in size.layers and size.layers[layer].macs == 0


def _sees(size: Size, layer: str, macs: float) -> bool:
    seen = size.layers[layer].macs if layer in size.layers else 0  # without parameters or operations it is not there
    return seen is None or not seen < macs - 1  # nor where macs is not a number


class NetworkCosts:
    """Costs of one captured network in its present size, but for a constant.

    Args:
        widths: its widths.
        model: what they cost.
        counts_biases: whether each of the biases that layers get to carry constants costs one.
        streams: whether the units that read a channel of a stream may go together. If not, each of them is taken to
            save its share of what the channel costs.

    Attributes:
        num_streams: number of channels that units read as they are, and that go when none of these is left.
    """

    def __init__(self, widths: Widths, model: CostOfWidths, counts_biases: bool, streams: bool = True) -> None:
        self.widths, self.model, self._counts_biases = widths, model, counts_biases
        held = self.widths.held.unique(dim=0)
        self._streams, numbers = held[:, 0].unique(return_inverse=True)
        self._pairs, self._together = torch.stack([numbers, held[:, 1]]), streams
        self.num_streams = len(self._streams)
        units = torch.cat(list(self.widths.units.values()))
        self._sharing = torch.bincount(units, minlength=self.widths.count).clamp(min=1)

    def full(self) -> float:
        """Cost of the network as it is."""
        return self.model.of(torch.ones(self.widths.count, dtype=torch.bool))

    def of(self, keep: Mapping[str, Tensor]) -> float:
        """Cost of what slimming would leave; `keep` by names in the network."""
        return self._cost(*self.widths.remaining(keep))

    def priced(self, keep: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor], Tensor]:
        """The same, gate → (units,) float64, what each of its units costs beside those that are kept, and `streams`.

        The last, (streams,), is what a channel costs beside the units that read it, if several are left; of the only
        one it is a part. Units that would stay, since their constants cannot be carried, cost nothing themselves; but
        where a batch norm is switched off, the channel that it normalises goes.
        """
        kept, biases = self.widths.remaining(keep)
        prices = self.model.prices(kept)
        streams, (numbers, readers) = prices[self._streams], self._pairs
        prices = torch.where(self.widths.stuck, 0.0, prices)
        on = torch.zeros(self.widths.count, dtype=torch.bool)
        for gate, classes in self.widths.units.items():
            on[classes[keep[gate]]] = True
        left = torch.bincount(numbers[on[readers]], minlength=self.num_streams)
        shares = (left <= 1).double() if self._together else 1 / torch.bincount(numbers, minlength=self.num_streams)
        prices = prices.index_add(0, readers, (streams * shares)[numbers])
        own = prices / self._sharing
        own_prices = {gate: own[classes] for gate, classes in self.widths.units.items()}
        return self._cost(kept, biases), own_prices, streams * (1 - shares)

    def streams(self, units: Mapping[str, Tensor]) -> Tensor:
        """(2, pairs) int64: channels of streams and the units that read them; none if these do not go together.

        Args:
            units: gate → (units,) int64, the number of each.
        """
        if not self._together:
            return self._pairs[:, :0]
        owners = torch.full((self.widths.count,), -1)
        for gate, classes in self.widths.units.items():
            owners[classes] = units[gate]
        numbers, readers = self._pairs
        return torch.stack([numbers, owners[readers]])

    def _cost(self, kept: Tensor, biases: int) -> float:
        return self.model.of(kept) + (biases if self._counts_biases else 0)


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

    def priced(self, kept: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor], Tensor]:
        """The same, layer → (units,) float64, what each of its units costs beside those that are kept, and `streams`.

        The last, (streams,), is what a channel of a stream costs that goes when none of the units that read it is left.
        """
        total, prices, streams = self._rest, dict[str, Tensor](), [torch.empty(0, dtype=torch.float64)]
        for name, costs in self._networks.items():
            own, found, several = costs.priced(_inside(name, costs, kept))
            total += own
            prices |= {join(name, gate): each for gate, each in found.items()}
            streams.append(several)
        own_prices = {layer: prices.get(layer, torch.zeros(len(mask))) for layer, mask in kept.items()}
        return total, own_prices, torch.cat(streams)

    def streams(self, units: Mapping[str, Tensor]) -> Tensor:
        """(2, pairs) int64: channels of streams, numbered over all networks, and the units that read them.

        Args:
            units: layer, by its name in the model → (units,) int64, the number of each.
        """
        pairs, first = [torch.empty(2, 0, dtype=torch.int64)], 0
        for name, costs in self._networks.items():
            pairs.append(costs.streams(_inside(name, costs, units)) + torch.tensor([[first], [0]]))
            first += costs.num_streams
        return torch.cat(pairs, dim=1)


def _inside(name: str, costs: NetworkCosts, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {gate: kept[join(name, gate)].cpu() for gate in costs.widths.units}
