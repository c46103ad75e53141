"""Handlers of the operators that put other values in the place of elements: masks, fillings, dropout, noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from lightning_fscreen.slimming.elementwise import note_mixed, operand_of, unify_operands, with_rank
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments
from lightning_fscreen.slimming.slots import Value


def masked(walk: Walk, node: Any) -> Value:
    """Some elements are replaced by a number, or by those of another tensor, as a mask says.

    Where both are the same constant, so is the result.
    """
    given = arguments(node)
    if "self" not in given:
        raise Unsupported("it gives the places where a condition holds")
    shape = tuple(node.meta["val"].shape)
    operands = {source: operand_of(walk, source) for source in node.all_input_nodes}
    labels = unify_operands(walk, list(operands.values()), shape)
    note_mixed(walk, operands, list(operands.values()), labels)
    ones = [1] * len(shape)
    sides = [given[name] for name in ("self", "other" if "other" in given else "value")]
    constants, known = zip(
        *(
            (with_rank(operands[side].constant, len(shape)), with_rank(operands[side].known, len(shape)))
            if isinstance(side, fx.Node)
            else (torch.full(ones, float(side), dtype=torch.float64), torch.ones(ones, dtype=torch.bool))
            for side in sides
        ),
        strict=True,
    )
    same = known[0] & known[1] & (constants[0] == constants[1])
    return Value(shape, labels, torch.where(same, constants[0], 0.0), same)


def causal(walk: Walk, node: Any) -> Value:
    """Zeros or sums over the places up to each one, along dimensions that are none of channels."""
    value, given = walk.value(node.args[0]), arguments(node)
    if any(value.labels.shape[dim] > 1 for dim in ([given["dim"]] if "dim" in given else [-1, -2])):
        raise Unsupported("it treats channels by their numbers")
    return Value(value.shape, value.labels, torch.zeros_like(value.constant), torch.zeros_like(value.known))


def copy(walk: Walk, node: Any) -> Value:
    """What is copied into a tensor takes the place of its elements, and goes with them."""
    target, source = (operand_of(walk, item) for item in node.args[:2])
    labels = unify_operands(walk, [target, source], target.shape)
    rank = len(target.shape)
    return Value(target.shape, labels, with_rank(source.constant, rank), with_rank(source.known, rank))


def fill(walk: Walk, node: Any) -> Value:
    """The same number everywhere."""
    value = walk.value(node.args[0])
    number = node.args[1] if len(node.args) > 1 else 0.0
    if isinstance(number, fx.Node):
        source = walk.values.get(number)
        if not isinstance(source, Value) or not bool(source.known.all()):
            raise Unsupported("it fills in a number that is computed from values")
        number = float(source.constant.flatten()[0])
    return Value(value.shape, value.labels, torch.full_like(value.constant, number), torch.ones_like(value.known))


def dropout(walk: Walk, node: Any, keeps_zero: bool = True) -> Value:
    """In train mode only zeros are constant, and they only if dropping means to set to zero."""
    value = walk.value(node.args[0])
    given = arguments(node)
    if not (given["p"] and (given["train"] or walk.training)):  # the graph of eval mode may stand for both
        return value
    known = value.known & (value.constant == 0) if keeps_zero else torch.zeros_like(value.known)
    return Value(value.shape, value.labels, value.constant, known)


def rrelu(walk: Walk, node: Any) -> Value:
    """A random slope, of which zeros know nothing."""
    value = walk.value(node.args[0])
    return Value(value.shape, value.labels, torch.zeros_like(value.constant), value.known & (value.constant == 0))


def noise(walk: Walk, node: Any) -> Value:
    """Random numbers of the same shape."""
    value = walk.value(node.args[0])
    return Value(value.shape, value.labels, value.constant, torch.zeros_like(value.known))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("masked_fill", "masked_fill_", "where"), masked),
    **dict.fromkeys(("tril", "triu", "cumsum"), causal),
    "copy_": copy,
    **dict.fromkeys(("fill_", "zero_"), fill),
    **dict.fromkeys(("dropout", "dropout_", "feature_dropout", "feature_dropout_"), dropout),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), partial(dropout, keeps_zero=False)),
    **dict.fromkeys(("rrelu", "rrelu_"), rrelu),
    **dict.fromkeys(("bernoulli", "bernoulli_", "uniform_", "normal_"), noise),
}
