"""Groups of layers whose channels go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def coupled_layers(units: Mapping[str, Iterable[int]]) -> list[list[str]]:
    """Connected components of layers that share units.

    Args:
        units: layer → the unit of each of its channels; equal numbers, in one layer or in several, share their fate;
            negative ones belong to none.

    Returns:
        Layers that share units, directly or through others, in lists of their own; in the order of the layers.
    """
    groups: list[tuple[list[str], set[int]]] = []
    for name, labels in units.items():
        own = {int(label) for label in labels if label >= 0}
        names = [name]
        for group in [group for group in groups if group[1] & own]:
            groups.remove(group)
            names, own = [*group[0], *names], own | group[1]
        groups.append((names, own))
    order = {name: place for place, name in enumerate(units)}
    return sorted((sorted(names, key=order.__getitem__) for names, _ in groups), key=lambda names: order[names[0]])
