"""One amount for all layers, or different ones by patterns over their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

Amount = float | Mapping[str, float]
"""A fraction, or {glob pattern over layer names: fraction}: the first pattern that matches a layer counts, and layers
that none matches are not pruned."""


def check_range(amount: Amount) -> None:
    """Check that all fractions lie in [0, 1).

    Raises:
        ValueError: one does not, or there is none.
    """
    values = {"": amount} if isinstance(amount, int | float) else amount
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"amount must be a fraction, or a dict of patterns and fractions, got {amount!r}")
    for pattern, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            where = f"amount[{pattern!r}]" if pattern else "amount"
            raise ValueError(f"{where} is the fraction pruned in the end and must lie in [0, 1), got {value}")


def parts(amount: Amount, layers: Sequence[str]) -> dict[str, tuple[float, list[str]]]:
    """Pattern → its amount, and the layers that are ranked together to meet it; without patterns, "" → all."""
    if not isinstance(amount, Mapping):
        return {"": (amount, list(layers))}
    found: dict[str, tuple[float, list[str]]] = {pattern: (value, []) for pattern, value in amount.items()}
    for layer in layers:
        pattern = next((each for each in found if fnmatchcase(layer, each)), None)
        if pattern is not None:
            found[pattern][1].append(layer)
    return found


def overall(amount: Amount, totals: Mapping[str, int]) -> float:
    """Fraction of all candidates that is pruned in the end.

    Args:
        amount: one, or by patterns.
        totals: layer → number of candidates.
    """
    if not isinstance(amount, Mapping):
        return amount
    pruned = sum(value * sum(totals[layer] for layer in layers) for value, layers in parts(amount, [*totals]).values())
    return pruned / max(sum(totals.values()), 1)


def check_patterns(amount: Amount, layers: Sequence[str], units: Mapping[str, Tensor] | None) -> None:
    """Check patterns against the layers that can be pruned.

    Args:
        amount: one, or by patterns.
        layers: the layers.
        units: layer → (n,) int64; equal numbers, in several layers, are pruned together.

    Raises:
        ValueError: a pattern that matches no layer, or only such as an earlier one has matched; coupled layers under
            different amounts.
    """
    found = parts(amount, layers)
    for pattern, (_, matched) in found.items():
        if not matched and isinstance(amount, Mapping):
            taken = [layer for layer in layers if fnmatchcase(layer, pattern)]
            why = f"only matches {taken}, which patterns before it match; put it first" if taken else "matches no layer"
            raise ValueError(f"amount[{pattern!r}] {why}; the layers that can be pruned are {list(layers)}")
    by_layer = {layer: value for value, matched in found.values() for layer in matched}
    owners: dict[int, str] = {}
    for layer in layers if units is not None else ():
        assert units is not None
        for unit in units[layer][units[layer] >= 0].unique().tolist():
            other = owners.setdefault(unit, layer)
            if by_layer.get(other) != by_layer.get(layer):
                first, second = (f"{by_layer[each]:g}" if each in by_layer else "none" for each in (other, layer))
                raise ValueError(
                    f"units of {other!r} and {layer!r} are pruned together, but their amounts are {first} and "
                    f"{second}; let one pattern match both"
                )
