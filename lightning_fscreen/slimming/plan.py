"""The slimming plan: the indices that stay of every tensor, as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.modules import join
from lightning_fscreen.slimming.attributes import Attributes, attributes_from_json, attributes_to_json, followed
from lightning_fscreen.slimming.sizes import Sizes, followed_sizes, sizes_from_json, sizes_to_json
from lightning_fscreen.slimming.summary import plan_table
from lightning_fscreen.tables import Shown, Table

_FORMAT = 1
_LARGE, _BLOCK = 2**20, 2**18  # elements


class PlanError(ValueError):
    """A slimming plan that is damaged or does not fit the model."""


def module_of_gate(name: str, modules: Collection[str]) -> str:
    """The module of a gate; heads that no module combines belong to their projection, which their name begins with."""
    return name if name in modules else name.rpartition(".")[0]


@dataclass(frozen=True, repr=False)
class SlimmingPlan(Shown):
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
        kept_for: gates that keep units which are switched off, how many, and why; a record.
        attributes: module → {attribute: (before, after)}: sizes in forward that count channels, and the eps of norms.
        sizes: module → numbers that its forward computes from others and gives to calls, and what these get instead;
            see `slimming/sizes.py`.
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
    sizes: Sizes = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> SlimmingPlan:
        """Itself: nobody changes a plan."""
        return self

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.cuts or self.biases or self.selects)

    def _table(self) -> Table:
        return plan_table(self.shapes, self.cuts, self.groups, self.biases, self.selects, self.pinned, self.removed)

    def is_like(self, other: SlimmingPlan) -> bool:
        """Whether both do the same to a network."""
        fields = ("shapes", "cuts", "groups", "biases", "selects", "attributes", "sizes")
        return all(getattr(self, field) == getattr(other, field) for field in fields)

    def under(self, prefix: str) -> SlimmingPlan:
        """The same plan for a module that holds the network as its submodule `prefix`."""
        return self.renamed(lambda name: join(prefix, name))

    def renamed(self, rename: Callable[[str], str]) -> SlimmingPlan:
        """The same plan for a network with other names of modules and tensors."""
        return SlimmingPlan(
            {rename(name): shape for name, shape in self.shapes.items()},
            {rename(name): cut for name, cut in self.cuts.items()},
            {rename(name): groups for name, groups in self.groups.items()},
            tuple(rename(name) for name in self.biases),
            {rename(name): indices for name, indices in self.selects.items()},
            dict(self.pinned),
            {rename(name): count for name, count in self.removed.items()},
            {rename(name): indices for name, indices in self.streams.items()},
            {rename(name): reason for name, reason in self.kept_for.items()},
            {rename(name): values for name, values in self.attributes.items()},
            {rename(name): values for name, values in self.sizes.items()},
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
            inner(self.sizes),
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
            followed_sizes(self.sizes, second.sizes),
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

    def cut(self, name: str, tensor: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """The part of a tensor that stays.

        Args:
            name: of a parameter or buffer.
            tensor: of its shape before or, with `dims`, of the sizes that it has along these dimensions.
            dims: dimensions of the parameter that those of the tensor are; the same by default.
        """
        cuts = self.cuts.get(name, {})
        if dims is not None:
            cuts = {place: cuts[dim] for place, dim in enumerate(dims) if dim in cuts}
        indices = {dim: torch.tensor(kept, dtype=torch.int64, device=tensor.device) for dim, kept in cuts.items()}
        if cuts.keys() == {0, 1} and tensor.numel() > _LARGE:  # one after the other would need room for both results
            return _cut_rows_and_columns(tensor, indices[0], indices[1])
        for dim, index in indices.items():
            tensor = tensor.index_select(dim, index)
        return tensor

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
                "sizes": sizes_to_json(self.sizes),
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
                sizes_from_json(data.get("sizes", {}), _integer),
            )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(f"this is not a slimming plan: {type(error).__name__}: {error}") from error


def _cut_rows_and_columns(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A part of a large tensor, by blocks of rows: all room that it takes beside the result is that of a block."""
    result = tensor.new_empty(len(rows), len(columns), *tensor.shape[2:])
    size = max(1, _BLOCK // tensor[0].numel())
    for block, chosen in zip(result.split(size), rows.split(size), strict=True):
        block.copy_(tensor.index_select(0, chosen).index_select(1, columns))
    return result


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise PlanError(f"the slimming plan holds {value!r} where an integer belongs")
    return value
