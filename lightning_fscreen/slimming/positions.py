"""How much is multiplied in one forward pass: every weight so many times, activations with each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from torch import fx

from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.interpreter import arguments, module_of, operator_name

_WEIGHTS = {
    "linear": "weight",
    **{f"conv{transposed}{dims}d": "weight" for transposed in ("", "_transpose") for dims in (1, 2, 3)},
    "matmul": "other",
    "mm": "mat2",
    "addmm": "mat2",
}


def positions(captured: Capture, idle: Collection[str] = ()) -> dict[str, float]:
    """Weight of a layer → multiplications, in one forward pass, of each of its elements.

    These are the rows that a linear layer gets and the output positions of a convolution (those of the input, if it is
    transposed), over all instances and all calls: a layer takes positions · (elements of its weight) multiply–adds,
    grouped or not, whatever it has lost. Of a weight that is taken apart for several calls, it is the mean. Where their
    number depends on values (rows that an expert gets), it is not a number.

    Args:
        captured: the network.
        idle: modules whose calls do not count.
    """
    found: dict[str, float] = {}
    for _, weight, macs in _multiplied(captured, idle):
        found[weight.name] = found.get(weight.name, 0) + macs / math.prod(_shape(weight.node))
    return found


def by_module(captured: Capture) -> dict[str, float]:
    """Module → the multiply–adds of its own calls, without those of the modules that it calls; see `positions`."""
    found: dict[str, float] = defaultdict(float)
    for node, _, macs in _multiplied(captured, ()):
        found[module_of(node)] += macs
    both = products(captured)
    for node in captured.graph.nodes:
        found[module_of(node)] += both.get(node.name, 0)
    return found


class _Weight(NamedTuple):
    name: str
    node: Any


def _multiplied(captured: Capture, idle: Collection[str]) -> Iterator[tuple[Any, _Weight, float]]:
    """Calls that multiply a weight, or a part of one: the node, the weight, the multiply–adds."""
    for node in captured.graph.nodes:
        name = operator_name(node)
        if name not in _WEIGHTS or module_of(node) in idle:
            continue
        given = arguments(node)
        factor = given[_WEIGHTS[name]]
        weight = _weight_of(factor, captured)
        if weight is None or (name == "matmul" and len(_shape(factor)) != 2):  # a matrix of each head, for instance
            continue
        source: Any = given.get("input", given.get("mat1", given.get("self")))
        shape, met = _shape(factor), _shape(source if "transpose" in name else node)
        if name.startswith("conv"):
            count = math.prod(met[-(len(shape) - 2) :]) * (met[0] if len(met) == len(shape) else 1)
        else:
            count = math.prod(met[:-1])
        yield node, weight, _number(count * math.prod(shape))


def _weight_of(node: Any, captured: Capture) -> _Weight | None:
    """The parameter that a node is, or is a part of."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    name = captured.tensors.get(node.name) if isinstance(node, fx.Node) else None
    return None if name is None else _Weight(name, node)


def products(captured: Capture, idle: Collection[str] = ()) -> dict[str, float]:
    """Call that multiplies activations, as in attention → its multiply–adds.

    Args:
        captured: the network.
        idle: modules whose calls do not count.
    """
    found = {}
    of_weights = {node for node, *_ in _multiplied(captured, ())}
    for node in captured.graph.nodes:
        count = _PRODUCTS.get(operator_name(node))
        if count is not None and node not in of_weights and module_of(node) not in idle:
            found[node.name] = _number(count(node))
    return found


def _number(count: Any) -> float:
    return count if isinstance(count, int | float) else math.nan


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _of_matrices(node: Any) -> int:
    given = arguments(node)
    first = given.get("batch1", next(iter(given.values())))
    return math.prod(_shape(node)) * _shape(first)[-1]


def _of_attention(node: Any) -> int:
    given = arguments(node)
    query, key, value = (_shape(given[name]) for name in ("query", "key", "value"))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _of_names(node: Any) -> int:
    given = arguments(node)
    terms = given["equation"].replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, given["tensors"], strict=True):
        sizes |= dict(zip(term, _shape(tensor), strict=False))
    return math.prod(sizes.values())


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(("matmul", "bmm", "baddbmm"), _of_matrices),
    "scaled_dot_product_attention": _of_attention,
    "einsum": _of_names,
}
