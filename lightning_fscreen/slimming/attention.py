"""Handlers of the products of two activations, as in attention, where heads are a dimension that both have.

A head is one slot: all rows of the weights that make its queries, keys and values, and all columns that read it. The
layers' outputs are taken apart into heads by `view` and the like, which do not say which of their dimensions is that of
the heads. The first walk over a graph finds it: along it the factors of a product go with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from lightning_fscreen.slimming.elementwise import unify_operands
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, module_of, operator_name
from lightning_fscreen.slimming.layers import product
from lightning_fscreen.slimming.slots import PINNED, Value


def matmul(walk: Walk, node: Any) -> Value:
    """A product of two activations; of an activation and a parameter, it is a linear layer."""
    given = list(arguments(node).values())[:2]
    if any(walk.name(source) is not None for source in given):
        return product(walk, node)
    return _product(walk, node, *map(walk.value, given))


def baddbmm(walk: Walk, node: Any) -> Value:
    """The sum of something and a product."""
    given = arguments(node)
    result = _product(walk, node, walk.value(given["batch1"]), walk.value(given["batch2"]))
    return _joined(walk, [result, walk.value(given["self"])], result.shape)


def _product(walk: Walk, node: Any, first: Value, second: Value) -> Value:
    if min(len(first.shape), len(second.shape)) < 2:
        raise Unsupported("it multiplies a vector")
    batch = tuple(node.meta["val"].shape[:-2])
    rank = len(batch)
    factors = [_part(walk, first, rank, -1), _part(walk, second, rank, -2)]
    return _contracted(walk, node, [first, second], factors, range(rank))


def _part(walk: Walk, value: Value, batch: int, summed: int) -> Value:
    """A factor, in which the dimension that is summed over has the size 1."""
    value = _whole(walk, value, [summed])
    missing = [1] * (batch + 2 - len(value.shape))
    parts = (value.labels, value.constant, _silent(value, [summed]))
    shape = [*missing, *value.shape]
    shape[summed] = 1
    return Value(
        tuple(shape),
        *(part.narrow(summed, 0, 1).reshape(missing + list(part.narrow(summed, 0, 1).shape)) for part in parts),
    )


def einsum(walk: Walk, node: Any) -> Value:
    """A product over named dimensions."""
    given = arguments(node)
    terms, _, output = given["equation"].replace(" ", "").partition("->")
    inputs = terms.split(",")
    letters = "".join(inputs) + output
    if not output or not letters.isalpha() or any(len(set(term)) < len(term) for term in (*inputs, output)):
        raise Unsupported("its equation is not written out")
    if any(walk.name(source) is not None for source in given["tensors"]):
        raise Unsupported("it takes a parameter")
    values = [walk.value(source) for source in given["tensors"]]
    factors = []
    for term, value in zip(inputs, values, strict=True):
        summed = [place for place, letter in enumerate(term) if letter not in output]
        value = _whole(walk, value, summed)
        present = [letter for letter in output if letter in term]

        def moved(part: Tensor, term: str = term, summed: list[int] = summed, present: list[str] = present) -> Tensor:
            part = part.permute([term.index(letter) for letter in present] + summed)
            part = part.flatten(len(present))[..., 0] if summed else part
            return part.reshape([part.shape[present.index(letter)] if letter in present else 1 for letter in output])

        shape = tuple(value.shape[term.index(letter)] if letter in term else 1 for letter in output)
        factors.append(Value(shape, *map(moved, (value.labels, value.constant, _silent(value, summed)))))
    batch = [place for place, letter in enumerate(output) if all(letter in term for term in inputs)]
    places = [[term.index(output[place]) for place in batch] for term in inputs]
    return _contracted(walk, node, values, factors, *places)


def scaled_dot_product_attention(walk: Walk, node: Any) -> Value:
    """Heads are a dimension of the batch; those of keys and values may be fewer, each for several in a row."""
    given = arguments(node)
    query, key, value = (walk.value(given[name]) for name in ("query", "key", "value"))
    if len(query.shape) < 3:
        raise Unsupported("it has a single head")
    values = [query, *(_for_each_query(item, query) if given.get("enable_gqa") else item for item in (key, value))]
    rank = len(query.shape) - 2
    factors = []
    values = [_whole(walk, item, [-1, -2]) for item in values]
    for item in values:
        # Queries and keys of zeros attend to everything alike: only values of zeros give zeros.
        silent = _silent(item, [-1, -2]) if item is values[-1] else torch.zeros_like(item.known)
        narrowed = [part[..., :1, :1] for part in (item.labels, item.constant, silent)]
        factors.append(Value((*item.shape[:-2], 1, 1), *narrowed))
    if given["attn_mask"] is not None:
        mask = _whole(walk, walk.value(given["attn_mask"]), [-1, -2])
        fields = (mask.labels, mask.constant, torch.zeros_like(mask.known))
        factors.append(Value((*mask.shape[:-2], 1, 1), *(part[..., :1, :1] for part in fields)))
    return _contracted(walk, node, values, factors, range(rank))


def _for_each_query(value: Value, query: Value) -> Value:
    if value.shape[-3] == 1:
        return value
    repeats = query.shape[-3] // value.shape[-3]
    parts = (part if part.shape[-3] == 1 else part.repeat_interleave(repeats, -3) for part in value.fields())
    return Value((*value.shape[:-3], query.shape[-3], *value.shape[-2:]), *parts)


def _whole(walk: Walk, value: Value, dims: Sequence[int]) -> Value:
    """A factor of which dimensions are summed over: if these are channels, they all stay."""
    if walk.head_dims is None or all(value.labels.shape[dim] == 1 for dim in dims):
        return value
    walk.slots.pin(value.labels, "it is multiplied by another activation, and summed over")
    return replace(value, labels=Value.pinned(value.shape).labels)


def _silent(value: Value, dims: Sequence[int]) -> Tensor:
    """Where a factor is zero, and so is its product with anything, whatever is summed over; for handlers' `known`."""
    zero = value.known & (value.constant == 0)
    for dim in dims:
        zero = zero.all(dim, keepdim=True)
    return zero


def _contracted(
    walk: Walk, node: Any, values: Sequence[Value], factors: Sequence[Value], *batches: Sequence[int]
) -> Value:
    """The product of factors that are arranged like it."""
    shape = tuple(node.meta["val"].shape)
    if walk.head_dims is None:
        for index, value in enumerate(values):
            offset = 0 if len(batches) > 1 else len(shape) - len(value.shape)
            batch = batches[min(index, len(batches) - 1)]
            walk.contracted.append((value.labels, tuple(dim - offset for dim in batch if dim >= offset)))
        return Value.pinned(shape)
    batch = [place for place in range(len(shape)) if all(factor.shape[place] == shape[place] for factor in factors)]
    if any(factor.labels.shape[place] > 1 for factor in factors for place in batch):
        shared = [place for place in range(len(shape)) if place not in batch]
        factors = [_whole(walk, factor, shared) for factor in factors]  # values that all heads take the mean of
    result = _joined(walk, factors, shape)
    walk.slots.products[node.name] = result.labels.flatten()
    zero = torch.broadcast_tensors(*(factor.known for factor in factors))
    known = torch.stack(zero).any(0)
    if bool(result.labels.any()):
        walk.slots.attended.append((module_of(node), result.labels.flatten()))
    return Value(shape, result.labels, torch.zeros_like(known, dtype=torch.float64), known)


def _joined(walk: Walk, factors: Sequence[Value], shape: tuple[int, ...]) -> Value:
    labels = unify_operands(walk, list(factors), shape)
    ones = [1] * len(shape)
    return Value(shape, labels, torch.zeros(ones, dtype=torch.float64), torch.zeros(ones, dtype=torch.bool))


def find_head_dims(graph: fx.Graph, seek: Callable[[], Walk]) -> dict[str, int]:
    """Operators that take channels apart into heads → the dimension of their output that is that of the heads.

    Args:
        graph: a captured network.
        seek: walks over it without unifying anything.
    """
    if not any(operator_name(node) in HANDLERS for node in graph.nodes):
        return {}
    walk = seek()
    if not walk.contracted:
        return {}
    head_of = torch.full((walk.slots.count,), torch.iinfo(torch.int64).max)
    for labels, batch in walk.contracted:
        sizes = [labels.shape[dim] for dim in batch]
        numbers = torch.arange(torch.Size(sizes).numel()).reshape(
            [labels.shape[dim] if dim in batch else 1 for dim in range(labels.ndim)]
        )
        head_of.scatter_reduce_(0, labels.flatten(), numbers.expand(labels.shape).flatten(), "amin")
    head_of[PINNED] = torch.iinfo(torch.int64).max
    dims = {}
    for name, labels in walk.splits.items():
        heads = head_of[labels]
        varying = [dim for dim in range(heads.ndim) if not bool((heads == heads.narrow(dim, 0, 1)).all())]
        if len(varying) == 1 and int(heads.max()) < torch.iinfo(torch.int64).max:
            dims[name] = varying[0]
    return dims


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("matmul", "bmm"), matmul),
    "baddbmm": baddbmm,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
