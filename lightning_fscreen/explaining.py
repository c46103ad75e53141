"""`explain`: what could be pruned from a network, what goes together, what it would save, and why the rest stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.granularity import GRANULARITIES, Granularity, Patterns
from lightning_fscreen.costs.size import Size, measure_size
from lightning_fscreen.modules import batch_size, uncompiled
from lightning_fscreen.ranking.per_cost import Costs
from lightning_fscreen.ranking.units import Units
from lightning_fscreen.slimming.gates import call_arguments
from lightning_fscreen.tables import Row, Table, grouped, percent, readable


@dataclass(frozen=True)
class ExplainedLayer:
    """A layer with units that can be pruned.

    Attributes:
        name: its name in the model.
        kind: "channel" of a batch norm, "neuron" (output of a linear or convolution layer), or "head" of an attention.
        units: number of its units.
        prunable: how many of them can be pruned; the others are coupled to what stays.
        coupled: other layers that lose the same units.
        params: parameters that go with one of its units, in this layer and in all others; the mean over its units.
        macs: multiply–adds of one instance, likewise.
    """

    name: str
    kind: str
    units: int
    prunable: int
    coupled: tuple[str, ...]
    params: int
    macs: int


@dataclass(frozen=True)
class Explanation:
    """What could be pruned from a network; `print(explanation)`, or a notebook, shows it as a table.

    Attributes:
        layers: those with units that can be pruned, in the order of the network.
        not_pruned: all others with weights, and why.
        params, macs: of the network, and what is left of them if every layer keeps only as much as it has to.
    """

    layers: tuple[ExplainedLayer, ...]
    not_pruned: Mapping[str, str]
    params: tuple[int, int]
    macs: tuple[int, int]

    def __str__(self) -> str:
        """As a table of the layers, and what stays, grouped by its reason."""
        return str(self._table())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._table().title}>"

    def _repr_html_(self) -> str:
        """The same, for notebooks."""
        return self._table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """As primitives."""
        return {**asdict(self), "not_pruned": dict(self.not_pruned)}

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _table(self) -> Table:
        rows = [Row(layer.name, ((layer.prunable,), (layer.params,), (layer.macs,))) for layer in self.layers]
        together = [", ".join(sorted([layer.name, *layer.coupled])) for layer in self.layers if layer.coupled]
        least = [f"{percent(full - left, full)} of the {what}" for what, (full, left) in self._budgets().items()]
        return Table(
            f"{readable(sum(layer.prunable for layer in self.layers))} units can be pruned",
            (("units", "counts"), ("parameters of one", "counts"), ("multiply–adds of one", "counts")),
            tuple(rows),
            None,
            {
                "at most, with one unit left in every layer": least,
                "lose the same units": list(dict.fromkeys(together)),
                "not pruned": grouped(self.not_pruned.items()),
            },
        )

    def _budgets(self) -> dict[str, tuple[int, int]]:
        return {"parameters": self.params, "multiply–adds": self.macs}


def explain(
    model: nn.Module,
    example_inputs: Any,
    granularity: Literal["unit", "channel"] = "unit",
    include: Patterns = None,
    exclude: Patterns = None,
) -> Explanation:
    """Look at what could be pruned, without changing anything.

    The costs of a unit are what slimming removes with it alone, from the whole network; beside others that go as well
    it is less.

    Args:
        model: any module that `torch.export` can capture; untouched.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `forward`, at least two
            instances.
        granularity: "unit" or "channel", as of `ScreeningPruningCallback`.
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.

    Raises:
        ValueError: nothing to prune, with all reasons; another granularity; patterns that match nothing.
        CaptureError: the model cannot be captured.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import explain
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
        >>> print(explain(net, torch.randn(2, 3, 6, 6)))
        8 units can be pruned
        <BLANKLINE>
        layer  units  parameters of one  multiply–adds of one
        ─────  ─────  ─────────────────  ────────────────────
        1          8                190                   592
        <BLANKLINE>
        at most, with one unit left in every layer:
          86.93 % of the parameters
          87.50 % of the multiply–adds
        <BLANKLINE>
        not pruned:
          a batch norm normalises its outputs, and the channels of that are the units: 0
          it is an output of the network: 4
    """
    if granularity not in ("unit", "channel"):
        raise ValueError(f'granularity must be "unit" or "channel", got {granularity!r}')
    model = uncompiled(model)
    args, kwargs = call_arguments(example_inputs)
    found = GRANULARITIES[granularity](model, include, exclude)
    unused = found.learn(model, args, kwargs)
    found.leave_out(dict.fromkeys(unused, "the example inputs do not reach it"))
    size = measure_size(model, (args, kwargs), batch_size((args, kwargs)) or 1)
    units = {name: own.cpu() for name, own in (found.units() or {}).items()}
    whole = {name: torch.ones(len(own), dtype=torch.bool) for name, own in units.items()}
    costs = {currency: _costs(found, size, currency) for currency in ("params", "macs")}
    prices = {currency: _of_units(units, each.priced(whole)[1]) for currency, each in costs.items()}
    rest = Units({name: torch.zeros(len(own)) for name, own in units.items()}, whole, units, 1)
    least = rest.without(rest.lowest_first(rest.scores))
    kinds, members = found.kinds(), {name: set(own[own >= 0].tolist()) for name, own in units.items()}
    layers = tuple(
        ExplainedLayer(
            name,
            kinds[name],
            len(own),
            int((own >= 0).sum()),
            tuple(other for other in units if other != name and members[other] & members[name]),
            *(round(float(prices[currency][name][own >= 0].mean())) for currency in ("params", "macs")),
        )
        for name, own in units.items()
    )
    left = {currency: round(each.of(least)) for currency, each in costs.items()}
    assert size.macs is not None
    return Explanation(layers, dict(found.not_pruned), (size.params, left["params"]), (size.macs, left["macs"]))


def _costs(found: Granularity[Any], size: Size, currency: Literal["params", "macs"]) -> Costs:
    costs = found.costs(size, currency)
    assert costs is not None
    return costs


def _of_units(units: Mapping[str, Tensor], prices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer → for each of its units the price of all that goes together."""
    flat, values = torch.cat(list(units.values())), torch.cat([prices[name] for name in units])
    total = values.new_zeros(int(flat.max()) + 2).index_add(0, flat + 1, values)
    return {name: total[own + 1] for name, own in units.items()}
