"""Products with the transpose of a parameter are linear layers, and are written as such in a captured graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.matmul.default, _ATEN.mm.default)
_TURNS = (_ATEN.t.default, _ATEN.numpy_T.default, _ATEN.mT.default, _ATEN.adjoint.default)
_SWAPS = (_ATEN.transpose.int, _ATEN.swapaxes.default, _ATEN.swapdims.default)


def use_linear(graph: fx.Graph, parameters: Collection[str]) -> None:
    """Write `x @ weight.T`, `x @ weight.T + bias` and `linear(x, matrix.T)` without the transpose.

    Args:
        graph: of a captured network, changed in place.
        parameters: names of its placeholders for parameters and buffers.
    """
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        of_layer = node.target is _ATEN.linear.default
        if not of_layer and node.target not in _PRODUCTS:
            continue
        source, matrix, *bias = node.args
        weight = _turned(matrix, parameters)
        if weight is None or node.kwargs:
            continue
        last = node
        if of_layer:
            new = _call(graph, last, _ATEN.matmul.default, source, weight)
            new = _call(graph, last, _ATEN.add.Tensor, new, *bias) if any(bias) else new
        else:
            last, *bias = _sum(node, parameters)
            new = _call(graph, last, _ATEN.linear.default, source, weight, *bias)
        last.replace_all_uses_with(new)
        for unused in dict.fromkeys((last, node, matrix)):
            if not unused.users:
                graph.erase_node(unused)


def _call(graph: fx.Graph, node: fx.Node, target: Any, *given: Any) -> fx.Node:
    """A call in front of a node, with the same result."""
    with graph.inserting_before(node):
        new = graph.call_function(target, given)
    new.meta = dict(node.meta)
    return new


def _turned(node: Any, parameters: Collection[str]) -> Any:
    """The parameter of which a node is the transpose; None if it is none."""
    if getattr(node, "op", "") != "call_function" or not node.args:
        return None
    source, *given = node.args
    if not isinstance(source, fx.Node) or source.name not in parameters or source.meta["val"].ndim != 2:
        return None
    swaps = node.target in _SWAPS and {int(dim) % 2 for dim in given} == {0, 1}
    permutes = node.target is _ATEN.permute.default and [dim % 2 for dim in given[0]] == [1, 0]
    return source if node.target in _TURNS or swaps or permutes else None


def _sum(product: Any, parameters: Collection[str]) -> list[Any]:
    """A product; or the sum that alone reads it, and the vector of parameters that it adds."""
    user = next(iter(product.users), product)
    if len(product.users) != 1 or user.target is not _ATEN.add.Tensor or user.kwargs:
        return [product]
    bias = next((source for source in user.all_input_nodes if source is not product), product)
    fits = bias.name in parameters and bias.meta["val"].shape == product.meta["val"].shape[-1:]
    return [user, bias] if fits else [product]
