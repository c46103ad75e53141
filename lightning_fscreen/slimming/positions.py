"""How often every weight is multiplied in one forward pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.interpreter import arguments, module_of, operator_name

_WEIGHTS = {
    "linear": "weight",
    **{f"conv{transposed}{dims}d": "weight" for transposed in ("", "_transpose") for dims in (1, 2, 3)},
    "matmul": "other",
    "mm": "mat2",
    "addmm": "mat2",
}


def positions(captured: Capture, idle: Collection[str] = ()) -> Counter[str]:
    """Weight of a layer → multiplications, in one forward pass, of each of its elements.

    These are the rows that a linear layer gets and the output positions of a convolution (those of the input, if it is
    transposed), over all instances and all calls: a layer takes positions · (elements of its weight) multiply–adds,
    grouped or not, whatever it has lost.

    Args:
        captured: the network.
        idle: modules whose calls do not count.
    """
    found: Counter[str] = Counter()
    for node in captured.graph.nodes:
        name = operator_name(node)
        if name not in _WEIGHTS or module_of(node) in idle:
            continue
        given = arguments(node)
        source: Any = given.get("input", given.get("mat1", given.get("self")))
        weight = captured.tensors.get(getattr(given[_WEIGHTS[name]], "name", ""))
        if weight is None:
            continue
        shape = tuple(given[_WEIGHTS[name]].meta["val"].shape)
        met = tuple((source if "transpose" in name else node).meta["val"].shape)
        if name.startswith("conv"):
            positions_met = math.prod(met[-(len(shape) - 2) :])
            found[weight] += positions_met * (met[0] if len(met) == len(shape) else 1)
        else:
            found[weight] += math.prod(met[:-1])
    return found
