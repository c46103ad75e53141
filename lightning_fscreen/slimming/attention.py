"""Handlers of the products of two activations, as in attention, where heads are a dimension that both have.

A head is one slot: all rows of the weights that make its queries, keys and values, and all columns that read it. Which
dimension is that of the heads a first walk over the graph finds out (`seeking.py`).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.slimming.elementwise import unify_operands
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, module_of
from lightning_fscreen.slimming.layers import product
from lightning_fscreen.slimming.seeking import Term
from lightning_fscreen.slimming.slots import Value


def matmul(walk: Walk, node: Any) -> Value:
    """A product of two activations; of an activation and a matrix of parameters, it is a linear layer."""
    first, second = list(arguments(node).values())[:2]
    if walk.name(second) is not None and len(second.meta["val"].shape) == 2:
        return product(walk, node)
    return _product(walk, node, walk.value(first), walk.value(second))


def baddbmm(walk: Walk, node: Any) -> Value:
    """The sum of something and a product; times 0 it is of no account but for its shape, which broadcasts."""
    given = arguments(node)
    result = _product(walk, node, walk.value(given["batch1"]), walk.value(given["batch2"]))
    if given["beta"] == 0:
        return result
    return _joined(walk, [result, walk.value(given["self"])], result.shape)


def _product(walk: Walk, node: Any, first: Value, second: Value) -> Value:
    if min(len(first.shape), len(second.shape)) < 2:
        raise Unsupported("it multiplies a vector")
    rank = len(node.meta["val"].shape) - 2
    factors = [_part(walk, first, rank, -1), _part(walk, second, rank, -2)]
    terms = [Term(value, range(len(value.shape) - 2)) for value in (first, second)]
    return _contracted(walk, node, terms, factors)


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
    ranks = [len(walk.value(source).shape) for source in given["tensors"]]
    inputs, output = _without_dots(inputs, output, ranks)
    letters = "".join(inputs) + output
    if not output or not letters.isalpha() or any(len(set(term)) < len(term) for term in (*inputs, output)):
        raise Unsupported("its equation is not written out")
    values = [walk.value(source) for source in given["tensors"]]
    shared = [letter for letter in output if all(letter in term for term in inputs)]
    terms_of, factors = [], []
    for term, value in zip(inputs, values, strict=True):
        summed = [place for place, letter in enumerate(term) if letter not in output]
        terms_of.append(Term(value, [term.index(letter) for letter in shared], summed))
        value = _whole(walk, value, summed)
        present = [letter for letter in output if letter in term]

        def moved(part: Tensor, term: str = term, summed: list[int] = summed, present: list[str] = present) -> Tensor:
            part = part.permute([term.index(letter) for letter in present] + summed)
            part = part.flatten(len(present))[..., 0] if summed else part
            return part.reshape([part.shape[present.index(letter)] if letter in present else 1 for letter in output])

        shape = tuple(value.shape[term.index(letter)] if letter in term else 1 for letter in output)
        factors.append(Value(shape, *map(moved, (value.labels, value.constant, _silent(value, summed)))))
    return _contracted(walk, node, terms_of, factors)


def _without_dots(inputs: Sequence[str], output: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters in place of `...`, which stands for all dimensions that have none; inputs share the last of these."""
    pairs = zip(inputs, ranks, strict=True)
    more = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in pairs]
    free = [letter for letter in string.ascii_letters if letter not in "".join((*inputs, output))]
    dots = "".join(free[: max(more, default=0)])
    own = [term.replace("...", dots[len(dots) - count :]) for term, count in zip(inputs, more, strict=True)]
    return own, output.replace("...", dots)


def scaled_dot_product_attention(walk: Walk, node: Any) -> Value:
    """Heads are a dimension of the batch; those of keys and values may be fewer, each for several in a row."""
    given = arguments(node)
    query, key, value = (walk.value(given[name]) for name in ("query", "key", "value"))
    if len(query.shape) < 3:
        raise Unsupported("it has a single head")
    values = [query, *(_for_each_query(item, query) if given.get("enable_gqa") else item for item in (key, value))]
    terms = [Term(item, range(len(item.shape) - 2)) for item in values]
    masks = [] if given["attn_mask"] is None else [walk.value(given["attn_mask"])]
    if walk.heads.dims is None and masks:  # they are added to the scores
        scores = Value((*query.shape[:-1], key.shape[-2]), *(part[..., :1, :1] for part in query.fields()))
        unify_operands(walk, [scores, *masks], scores.shape)
    factors = []
    for item in (*values, *masks):
        whole = _whole(walk, item, [-1, -2])
        # Queries and keys of zeros attend to everything alike: only values of zeros give zeros.
        silent = _silent(whole, [-1, -2]) if item is values[-1] else torch.zeros_like(whole.known)
        missing = [1] * (len(query.shape) - len(item.shape))
        narrowed = (part[..., :1, :1] for part in (whole.labels, whole.constant, silent))
        factors.append(
            Value((*missing, *item.shape[:-2], 1, 1), *(part.reshape(missing + list(part.shape)) for part in narrowed))
        )
    return _contracted(walk, node, terms, factors)


def _for_each_query(value: Value, query: Value) -> Value:
    if value.shape[-3] == 1:
        return value
    repeats = query.shape[-3] // value.shape[-3]
    parts = (part if part.shape[-3] == 1 else part.repeat_interleave(repeats, -3) for part in value.fields())
    return Value((*value.shape[:-3], query.shape[-3], *value.shape[-2:]), *parts)


def _whole(walk: Walk, value: Value, dims: Sequence[int]) -> Value:
    """A factor of which dimensions are summed over: if these are channels, they all stay."""
    if walk.heads.dims is None or all(value.labels.shape[dim] == 1 for dim in dims):
        return value
    walk.slots.pin(value.labels, "it is multiplied by another activation, and summed over")
    return replace(value, labels=Value.pinned(value.shape).labels)


def _silent(value: Value, dims: Sequence[int]) -> Tensor:
    """Where a factor is zero, and so is its product with anything, whatever is summed over; for handlers' `known`."""
    zero = value.known & (value.constant == 0)
    for dim in dims:
        zero = zero.all(dim, keepdim=True)
    return zero


def _contracted(walk: Walk, node: Any, terms: Sequence[Term], factors: Sequence[Value]) -> Value:
    """The product of factors that are arranged like it."""
    shape = tuple(node.meta["val"].shape)
    if walk.heads.dims is None:
        walk.heads.products.append(terms)
        best = max(factors, key=lambda factor: (walk.heads.tell(factor.labels), factor.labels.numel()))
        return replace(Value.pinned(shape), labels=best.labels)
    heads = [place for place in range(len(shape)) if _runs_over_heads(walk, factors, place, shape[place])]
    if heads:
        others = [place for place in range(len(shape)) if place not in heads]
        factors = [_whole(walk, factor, others) for factor in factors]  # values that all heads take the mean of
    result = _joined(walk, factors, shape)
    walk.slots.products[node.name] = result.labels.flatten()
    zero = torch.broadcast_tensors(*(factor.known for factor in factors))
    known = torch.stack(zero).any(0)
    if heads and bool(result.labels.any()):
        walk.slots.attended.append((module_of(node), result.labels.flatten(), len(walk.slots.readers)))
    return Value(shape, result.labels, torch.zeros_like(known, dtype=torch.float64), known)


def _runs_over_heads(walk: Walk, factors: Sequence[Value], place: int, size: int) -> bool:
    """Whether a dimension of a product is one of its batch; or of heads that share keys and values."""
    varying = [factor for factor in factors if factor.labels.shape[place] > 1]
    everywhere = all(factor.shape[place] == size for factor in factors)
    return bool(varying) and (everywhere or any(walk.heads.are(factor.labels) for factor in varying))


def _joined(walk: Walk, factors: Sequence[Value], shape: tuple[int, ...]) -> Value:
    labels = unify_operands(walk, list(factors), shape)
    ones = [1] * len(shape)
    return Value(shape, labels, torch.zeros(ones, dtype=torch.float64), torch.zeros(ones, dtype=torch.bool))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("matmul", "bmm"), matmul),
    "baddbmm": baddbmm,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
