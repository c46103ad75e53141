"""The slimming plan: the indices that stay of every tensor, as plain data."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_fscreen.modules import join, named_tensors, own_tensors
from lightning_fscreen.slimming.attributes import Attributes, attributes_from_json, attributes_to_json, followed
from lightning_fscreen.slimming.summary import plan_table
from lightning_fscreen.tables import Table

_FORMAT = 1


class PlanError(ValueError):
    """A slimming plan that is damaged or does not fit the model."""


@dataclass(frozen=True)
class SlimmingPlan:
    """How a network became smaller; enough to do the same to a fresh one. `print(plan)` shows it as a table.

    Attributes:
        shapes: shape of every cut tensor before, by parameter or buffer name.
        cuts: tensor name → {dim: indices kept, ascending}.
        groups: convolution name → its number of groups afterwards (depthwise ones).
        biases: layers that got a bias, to carry constants.
        selects: batch norm → indices of the channels of its input that it reads.
        pinned: operators that kept their channels, and why; a record, not needed to apply the plan.
        removed: units or channels removed, by layer; of batch norms, if they select. Likewise.
        streams: batch norm that selects → indices, in the full-size network, of the channels of its input that stay.
            What it selects follows from them and from its own cuts, so that neither can be wrong alone.
        kept_for: batch norms that keep channels which are switched off, how many, and why; a record.
        attributes: module → {attribute: (size before, size after)}: numbers in forward that count channels.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cuts: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    selects: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    streams: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept_for: dict[str, str] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> SlimmingPlan:
        """Itself: nobody changes a plan."""
        return self

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.cuts or self.biases or self.selects)

    def __str__(self) -> str:
        """As a table: what stays of every layer; then selects, biases added, operators that kept their channels."""
        return str(self._table())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._table().title}>"

    def _repr_html_(self) -> str:
        """The same, for notebooks."""
        return self._table().to_html()

    def _table(self) -> Table:
        return plan_table(self.shapes, self.cuts, self.groups, self.biases, self.selects, self.pinned, self.removed)

    def is_like(self, other: SlimmingPlan) -> bool:
        """Whether both do the same to a network."""
        fields = ("shapes", "cuts", "groups", "biases", "selects", "attributes")
        return all(getattr(self, field) == getattr(other, field) for field in fields)

    def under(self, prefix: str) -> SlimmingPlan:
        """The same plan for a module that holds the network as its submodule `prefix`."""
        return SlimmingPlan(
            {join(prefix, name): shape for name, shape in self.shapes.items()},
            {join(prefix, name): cut for name, cut in self.cuts.items()},
            {join(prefix, name): groups for name, groups in self.groups.items()},
            tuple(join(prefix, name) for name in self.biases),
            {join(prefix, name): indices for name, indices in self.selects.items()},
            dict(self.pinned),
            {join(prefix, name): count for name, count in self.removed.items()},
            {join(prefix, name): indices for name, indices in self.streams.items()},
            {join(prefix, name): reason for name, reason in self.kept_for.items()},
            {join(prefix, name): values for name, values in self.attributes.items()},
        )

    def within(self, prefix: str) -> SlimmingPlan:
        """The part of the plan for the submodule `prefix`, with names as in it; `under` in reverse."""
        if not prefix:
            return self

        def inner(names: Mapping[str, Any]) -> dict[str, Any]:
            parts = {name: name.removeprefix(prefix).removeprefix(".") for name in names}
            return {part: names[name] for name, part in parts.items() if name == join(prefix, part)}

        return SlimmingPlan(
            inner(self.shapes),
            inner(self.cuts),
            inner(self.groups),
            tuple(inner(dict.fromkeys(self.biases))),
            inner(self.selects),
            dict(self.pinned),
            inner(self.removed),
            inner(self.streams),
            inner(self.kept_for),
            inner(self.attributes),
        )

    def then(self, second: SlimmingPlan) -> SlimmingPlan:
        """This plan followed by `second`, which was made for the network that this one leaves."""
        cuts = {name: dict(dims) for name, dims in self.cuts.items()}
        shapes = {**second.shapes, **self.shapes}
        for name, dims in second.cuts.items():
            if name.rpartition(".")[2] == "bias" and name.rpartition(".")[0] in self.biases:
                shapes.pop(name)  # a fresh network does not have it; it is loaded at its final length
                continue
            own = cuts.setdefault(name, {})
            for dim, kept in dims.items():
                own[dim] = tuple(own[dim][index] for index in kept) if dim in own else kept
        removed = {name: self.removed.get(name, 0) + count for name, count in second.removed.items()}
        return SlimmingPlan(
            shapes,
            cuts,
            {**self.groups, **second.groups},
            (*self.biases, *second.biases),
            {**self.selects, **second.selects},
            {**self.pinned, **second.pinned},
            {**self.removed, **removed},
            {**self.streams, **self._streams_after(second)},
            {**self.kept_for, **second.kept_for},
            followed(self.attributes, second.attributes),
        )

    def _streams_after(self, second: SlimmingPlan) -> dict[str, tuple[int, ...]]:
        streams = {}
        for name, kept in second.streams.items():
            before = self.streams.get(name)
            if before is None and name not in self.selects:  # the batch norm read all of it
                before = self._channels(name)
            elif before is None:  # a plan of a version that did not record it
                continue
            streams[name] = kept if before is None else tuple(before[index] for index in kept)
        return streams

    def _channels(self, norm: str) -> tuple[int, ...] | None:
        """Indices of the channels that a batch norm keeps; None if it keeps all."""
        cuts = (self.cuts.get(join(norm, tensor), {}).get(0) for tensor in ("weight", "running_mean"))
        return next((kept for kept in cuts if kept is not None), None)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a tensor that stays."""
        for dim, kept in self.cuts.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.tensor(kept, dtype=torch.int64, device=tensor.device))
        return tensor

    def check(self, network: nn.Module) -> None:
        """Check that the plan fits a network and agrees with itself, before anything is changed.

        What it says twice is compared: shapes, rows and groups, what batch norms keep and what they select. Nothing is
        traced: indices that only say where a remaining tensor came from could be others without being noticed.

        Raises:
            PlanError: names the first tensor or module that differs.
        """
        tensors = named_tensors(network)
        for name, dims in self.cuts.items():
            if name not in tensors:
                raise PlanError(
                    f"the plan cuts {name!r}, which {type(network).__name__} does not have; is it another model?"
                )
            shape, planned = tuple(tensors[name].shape), tuple(self.shapes.get(name, ()))
            if shape != planned:
                raise PlanError(
                    f"the plan was made for {name!r} of shape {planned}, this model's has shape {shape}; "
                    "pass a fresh, full-size instance of the model that was slimmed"
                )
            for dim, kept in dims.items():
                _check_indices(name, dim, kept, shape)
        if stray := self.shapes.keys() - self.cuts.keys():
            raise PlanError(f"the plan has a shape of {min(stray)!r}, which it does not cut")
        modules = dict(network.named_modules())
        first = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
        for name in self.removed:
            if name not in modules:
                raise PlanError(f"the plan removes parts of {name!r}, which {type(network).__name__} does not have")
        for name in (*self.groups, *self.biases):
            if not isinstance(modules.get(name), nn.Linear | _ConvNd):
                raise PlanError(f"the plan changes layer {name!r}, which {type(network).__name__} does not have")
        for name, values in self.attributes.items():
            for attribute, (before, _) in values.items():
                found = getattr(modules.get(name), attribute, None)
                if found != before:
                    raise PlanError(
                        f"the plan was made for {join(name, attribute)!r} equal to {before}, this model's is {found}; "
                        "pass a fresh, full-size instance of the model that was slimmed"
                    )
        for name in self.selects:
            self._check_select(name, modules.get(name), type(network).__name__, first)
        norms = [name for name in self.removed if isinstance(modules[name], _BatchNorm)]
        for name in (*norms, *self.streams):  # batch norms are listed where they read fewer channels than there are
            if name not in self.selects:
                raise PlanError(f"the plan does not say which channels batch norm {name!r} selects")
        for name in self.biases:
            if modules[name].bias is not None:
                raise PlanError(f"the plan adds a bias to layer {name!r}, which has one; is it another model?")
        for name, module in modules.items():
            weight, _ = own_tensors(module)
            if isinstance(module, nn.Linear | _ConvNd) and id(weight) in first:
                self._check_groups(name, module, first[id(weight)])

    def _check_select(self, name: str, module: nn.Module | None, network: str, first: Mapping[int, str]) -> None:
        if not isinstance(module, _BatchNorm):
            raise PlanError(f"the plan selects channels for batch norm {name!r}, which {network} does not have")
        tensor = module.weight if module.weight is not None else module.running_mean
        shape = () if tensor is None else tuple(tensor.shape)
        _check_indices(f"{name} (selected channels)", 0, self.selects[name], shape, repeated=True)
        planned = self.cuts.get(first.get(id(tensor), ""), {}).get(0)
        own = planned if planned is not None else tuple(range(shape[0]))
        if len(self.selects[name]) != len(own):
            raise PlanError(
                f"the plan selects {len(self.selects[name])} channels for batch norm {name!r}, which has {len(own)}"
            )
        if name not in self.removed and len(own) < shape[0]:
            raise PlanError(f"the plan selects channels for batch norm {name!r}, of which it removes none")
        if name in self.streams:  # older versions did not write it
            stream = self.streams[name]
            _check_indices(f"{name} (its input)", 0, stream, shape)
            # Of a channel whose input is gone (its scale is zero), the one before it.
            if self.selects[name] != tuple(max(bisect_right(stream, channel) - 1, 0) for channel in own):
                raise PlanError(f"the plan selects other channels for batch norm {name!r} than those that it keeps")

    def _check_groups(self, name: str, module: nn.Linear | _ConvNd, weight: str) -> None:
        cuts = self.cuts.get(weight, {})
        planned = self.groups.get(name)
        if not isinstance(module, _ConvNd) or module.groups == 1:
            if planned is not None:
                raise PlanError(f"the plan gives layer {name!r} {planned} groups, but it has none")
            return
        sizes = [len(cuts[dim]) if dim in cuts else module.weight.shape[dim] for dim in (0, 1)]
        transposed = isinstance(module, _ConvTransposeNd)
        single = module.weight.shape[0] // module.groups == 1 if transposed else module.weight.shape[1] == 1
        groups = module.groups if planned is None else planned
        per_group = module.weight.shape[0] // module.groups
        # Groups of one input channel go one by one, the last one can lose rows; larger ones keep the same channels
        # each, until one is left of each.
        rows = Counter(row // per_group for row in cuts.get(0, range(module.weight.shape[0])))
        fits = len(rows) == groups and len(set(rows.values())) == 1
        if single and groups > 1:
            fits = fits and sizes[0] == groups * per_group
        if not single and planned is not None:
            fits = fits and (sizes[0] == groups if transposed else sizes[1] == 1)
        if not fits:
            raise PlanError(f"the plan gives layer {name!r} {groups} groups, which its {sizes[0]} rows do not fill")

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(
            {
                "format": _FORMAT,
                "shapes": self.shapes,
                "cuts": {name: {str(dim): kept for dim, kept in dims.items()} for name, dims in self.cuts.items()},
                "groups": self.groups,
                "biases": self.biases,
                "selects": self.selects,
                "pinned": self.pinned,
                "removed": self.removed,
                "streams": self.streams,
                "kept_for": self.kept_for,
                "attributes": attributes_to_json(self.attributes),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> SlimmingPlan:
        """From the text that `to_json` returned.

        Raises:
            PlanError: it is not a plan.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise PlanError(f"the slimming plan has format {data['format']!r}, this version reads {_FORMAT}")
            return cls(
                {str(name): tuple(map(_integer, shape)) for name, shape in data["shapes"].items()},
                {
                    str(name): {int(dim): tuple(map(_integer, kept)) for dim, kept in dims.items()}
                    for name, dims in data["cuts"].items()
                },
                {str(name): _integer(groups) for name, groups in data["groups"].items()},
                tuple(map(str, data["biases"])),
                {str(name): tuple(map(_integer, indices)) for name, indices in data["selects"].items()},
                {str(name): str(reason) for name, reason in data["pinned"].items()},
                {str(name): _integer(count) for name, count in data["removed"].items()},
                {str(name): tuple(map(_integer, kept)) for name, kept in data.get("streams", {}).items()},
                {str(name): str(reason) for name, reason in data.get("kept_for", {}).items()},  # not in older ones
                attributes_from_json(data.get("attributes", {}), _integer),
            )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"this is not a slimming plan: {type(error).__name__}: {error}") from error


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise PlanError(f"the slimming plan holds {value!r} where an integer belongs")
    return value


def _check_indices(name: str, dim: int, kept: tuple[int, ...], shape: tuple[int, ...], repeated: bool = False) -> None:
    if not 0 <= dim < len(shape):
        raise PlanError(f"the plan cuts dimension {dim} of {name!r}, which has shape {shape}")
    if not kept or any(second < first or (second == first and not repeated) for first, second in pairwise(kept)):
        raise PlanError(f"the plan's indices for dimension {dim} of {name!r} are empty, repeated or not ascending")
    if kept[0] < 0 or kept[-1] >= shape[dim]:
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise PlanError(f"the plan keeps index {wrong} of dimension {dim} of {name!r}, which has shape {shape}")
