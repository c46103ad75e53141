"""What a slimming plan did, layer by layer, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from lightning_fscreen.tables import Cell, Row, Table, grouped, listing, readable

_MOST_SELECTS = 8  # in a remark of their own, before the rest is counted

Shape = tuple[int, ...]
Cuts = Mapping[int, Sequence[int]]


def plan_table(
    shapes: Mapping[str, Shape],
    cuts: Mapping[str, Cuts],
    groups: Mapping[str, int],
    biases: Sequence[str],
    selects: Mapping[str, Sequence[int]],
    pinned: Mapping[str, str],
    removed: Mapping[str, int],
) -> Table:
    """A row for every module whose tensors are cut, and what else is changed; the arguments are those of the plan."""
    tensors: dict[str, list[str]] = {}
    for name in cuts:
        tensors.setdefault(name.rpartition(".")[0], []).append(name)
    after = {name: _cut(shapes[name], cuts[name]) for name in cuts}
    rows = []
    for module, names in tensors.items():
        units = _units([(shapes[name], cuts[name]) for name in names], removed.get(module))
        values = sum(prod(shapes[name]) for name in names), sum(prod(after[name]) for name in names)
        # The tensor with the most dimensions, which is the weight, says most.
        widest = max(names, key=lambda name: len(shapes[name]))
        remark = f"{widest.rpartition('.')[2]} {_written(shapes[widest])} → {_written(after[widest])}"
        rows.append(Row(module, (units, units, values), remark))
    reading = [f"{name} reads {len(indices)} channels" for name, indices in selects.items()]
    if len(reading) > _MOST_SELECTS:
        reading = [*reading[: _MOST_SELECTS - 1], f"and {len(reading) - _MOST_SELECTS + 1} more"]
    return Table(
        _title(sum(removed.values()), len(removed)) if cuts else "nothing was removed",
        (("units", "counts"), ("kept", "share"), ("values", "counts")),
        tuple(rows),
        None,
        {
            "batch norms that select from the channels of their input": reading,
            "convolutions with fewer groups": grouped((name, f"{left} left") for name, left in groups.items()),
            "layers that got a bias, for the constant outputs of what was removed": [listing(biases)] if biases else [],
            "operators that kept their channels": grouped(pinned.items()),
        },
    )


def _units(tensors: Sequence[tuple[Shape, Cuts]], removed: int | None) -> Cell:
    """(before, after) of the dimension that holds the module's units: the only one of a vector, else the first."""
    for shape, cut in sorted(tensors, key=lambda tensor: len(tensor[0])):
        for dim in range(len(shape)):
            if dim in cut and (removed is None or shape[dim] - len(cut[dim]) == removed):
                return (shape[dim], len(cut[dim])) if removed is not None or len(shape) == 1 else None
    return None


def _cut(shape: Shape, cut: Cuts) -> Shape:
    return tuple(len(cut[dim]) if dim in cut else size for dim, size in enumerate(shape))


def _written(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _title(units: int, layers: int) -> str:
    return f"{readable(units)} units and channels removed from {layers} layer{'s' if layers > 1 else ''}"
