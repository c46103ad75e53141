"""Handlers of the operators that compute every element by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming.interpreter import (
    Handler,
    Unsupported,
    Walk,
    by_channel,
    operator_name,
    written,
)
from lightning_fscreen.slimming.slots import PINNED, Value

ACTIVATIONS = """
    relu relu_ relu6 relu6_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu silu_ mish mish_ sigmoid
    sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ softplus softsign log_sigmoid
    clamp clamp_ clamp_min clamp_max threshold
""".split()
_POINTWISE = """
    abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square pow floor ceil round trunc frac erf
    erfc sin cos tan asin acos atan sinh cosh asinh acosh atanh sign sgn logit absolute negative sub subtract rsub
    maximum minimum fmax fmin lerp hardshrink softshrink nan_to_num clone contiguous alias detach lift_fresh_copy
""".split()
_ANSWERS = """
    isnan isinf isfinite gt ge lt le eq ne greater greater_equal less less_equal not_equal logical_and logical_or
    logical_not logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__ __xor__
""".split()
_VIEWS = ("view", "reshape", "unsqueeze")


def pointwise(walk: Walk, node: Any, zero_absorbs: bool = False, adds: bool = False, divides: bool = False) -> Value:
    """Elements that meet share their slot; constants are computed by the operator itself, in float64.

    Args:
        walk: the walk.
        node: the call.
        zero_absorbs: whether the output is zero where one of the operands is, as in a product.
        divides: whether it is zero where the first operand is, as in a quotient, whatever the second one is: by zero
            nothing can be divided anyway.
        adds: whether a constant plus a parameter is a constant, which training changes.

    Raises:
        Unsupported: an argument is a number computed from values, or there is more than one output.
    """
    operands = [operand_of(walk, source) for source in node.all_input_nodes]
    if adds:
        operands = [_shift(walk, *pair) for pair in zip(node.all_input_nodes, operands, strict=True)]
    if not isinstance(node.meta["val"], Tensor):
        raise Unsupported("it has more than one output")
    shape = tuple(node.meta["val"].shape)
    rank = len(shape)
    labels = unify_operands(walk, operands, shape)
    note_mixed(walk, node.all_input_nodes, operands, labels)
    known = torch.ones([1] * rank, dtype=torch.bool)
    for value in operands:
        known = known & with_rank(value.known, rank)
    constant = torch.zeros([1] * rank, dtype=torch.float64)
    if bool(known.any()):
        constants = [value.constant for value in operands]
        if written(node):  # in place there must be room for the result
            constants = list(torch.broadcast_tensors(*constants))
        constant = with_rank(_computed(node, dict(zip(node.all_input_nodes, constants, strict=True))), rank)
    for value in operands if zero_absorbs else operands[:1] if divides and node.args[0] in node.all_input_nodes else []:
        # A known quotient stays as it was computed: zero by zero is none.
        zero = with_rank(value.known & (value.constant == 0), rank) & (~known if divides else True)
        known, zero = torch.broadcast_tensors(known, zero)
        constant = torch.where(zero, 0.0, constant)
        known = known | zero
    if adds:
        _note_trained(walk, node.all_input_nodes, labels, known)
    return Value(shape, labels, constant, known)


def answer(walk: Walk, node: Any) -> Value:
    """As `pointwise`: yes or no. Masks are none of heads."""
    if walk.heads.dims is None:
        raise Unsupported
    return pointwise(walk, node)


def _computed(node: Any, constants: Mapping[fx.Node, Tensor]) -> Tensor:
    """What an operator makes of constants, float64.

    Raises:
        Unsupported: it fails on them.
    """

    def result(convert: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda source: convert(constants[source], source.meta["val"].dtype), (node.args, node.kwargs)
        )
        return torch.as_tensor(node.target(*args, **kwargs)).double()

    try:
        return result(lambda constant, dtype: constant.to(torch.bool) if dtype == torch.bool else constant.clone())
    except RuntimeError:  # some operators are for whole numbers alone
        try:
            return result(lambda constant, dtype: constant.clone() if dtype.is_floating_point else constant.to(dtype))
        except RuntimeError as error:
            raise Unsupported(f"it fails on constants: {error}") from error


def addcmul(walk: Walk, node: Any) -> Value:
    """A shift plus a product."""
    sources = node.args[:3]
    shift, *factors = (operand_of(walk, source) for source in sources)
    shape = tuple(node.meta["val"].shape)
    rank = len(shape)
    labels = unify_operands(walk, [shift, *factors], shape)
    note_mixed(walk, sources, [shift, *factors], labels)
    shift = _shift(walk, sources[0], shift)
    constant = node.target(shift.constant, *(factor.constant for factor in factors), **node.kwargs)
    first, second = (with_rank(factor.known, rank) for factor in factors)
    known = first & second
    for factor in factors:
        known = known | with_rank(factor.known & (factor.constant == 0), rank)
    known = known & with_rank(shift.known, rank)
    _note_trained(walk, sources[:1], labels, known)
    return Value(shape, labels, with_rank(constant, rank), known)


def _shift(walk: Walk, source: Any, value: Value) -> Value:
    """What is added; a parameter is taken for the constant that it is now."""
    return replace(value, known=torch.ones_like(value.known)) if parameter_behind(walk, source) else value


def _note_trained(walk: Walk, sources: Iterable[Any], labels: Tensor, known: Tensor) -> None:
    if walk.training and any(parameter_behind(walk, source) for source in sources):
        labels, known = torch.broadcast_tensors(labels, known)
        walk.slots.trained.append(labels[known])


def note_mixed(walk: Walk, sources: Iterable[Any], operands: Iterable[Value], labels: Tensor) -> None:
    """What meets an activation that is the same for all channels (spatial attention, a mask) is no constant then."""
    alone = [
        node for node, own in zip(sources, operands, strict=True) if own.labels.numel() == 1 and not own.known.all()
    ]
    if labels.numel() > 1 and any(walk.name(node) is None for node in alone):  # parameters are constants
        walk.slots.mixed.append(labels.flatten())


def parameter_behind(walk: Walk, node: Any) -> str | None:
    """Name of a parameter with one long dimension, of which a node is a view, or that it stands for."""
    while isinstance(node, fx.Node) and operator_name(node) in _VIEWS:
        node = node.args[0]
    name = walk.name(node)
    return name if name is not None and sum(size > 1 for size in walk.shape(name)) == 1 else None


def cast(walk: Walk, node: Any) -> Value:
    """Another dtype or device; constants are rounded where it is one of integers."""
    value = operand_of(walk, node.args[0])
    dtype = node.meta["val"].dtype
    exact = dtype.is_floating_point or dtype.is_complex
    constant = value.constant if exact else value.constant.to(dtype).double()
    return Value(value.shape, value.labels, constant, value.known)


def prelu(walk: Walk, node: Any) -> Value:
    """One slope for all channels, or one for each.

    A constant goes with the slope of its channel. If one slope is for all, what every channel puts into it trains it,
    so that only zeros can go.
    """
    source, slope = node.args
    name = walk.name(slope)
    if name is None:
        raise Unsupported("its slope is no parameter")
    value = walk.value(source)
    if torch.Size(walk.shape(name)).numel() == 1:
        walk.opaque.setdefault(name, "it is the slope of all channels")
        silent = value.known & (value.constant == 0)
        return Value(value.shape, value.labels, torch.zeros_like(value.constant), silent)
    labels, constant, known = walk.slots.along(value, 1)
    walk.slots.cut(name, 0, labels)
    if walk.training:  # whatever their signs, so that it is known which can go before their values are
        walk.slots.trained.append(labels[known])
    return by_channel(node, 1, labels, torch.where(constant < 0, walk.tensor(name), 1.0) * constant, known)


def vector(walk: Walk, source: Any) -> Value:
    """The value of a tensor argument; a parameter gets slots along its only long dimension, or stays whole."""
    is_vector = walk.name(source) is not None and parameter_behind(walk, source) is not None
    return operand_of(walk, source) if is_vector else walk.value(source)


def operand_of(walk: Walk, source: Any) -> Value:
    """The value of a tensor argument; a parameter gets slots along its only long dimension.

    Raises:
        Unsupported: the argument is no tensor.
    """
    name, value = walk.name(source), walk.values[source]
    if not isinstance(value, Value):
        raise Unsupported("one of its arguments is computed from values")
    if name is None or source.meta["val"].is_complex():  # of complex numbers no constants are known
        return walk.value(source)
    return walk.table(source) or _parameter(walk, name)


def _parameter(walk: Walk, name: str) -> Value:
    shape = walk.shape(name)
    ones = [1] * len(shape)
    long = [dim for dim, size in enumerate(shape) if size > 1]
    value = Value.pinned(shape)
    if not walk.training or len(long) == 1:
        value = Value(shape, value.labels, walk.tensor(name), torch.full(ones, not walk.training))
    if len(long) == 1:
        labels = walk.slots.dims.get((name, long[0]))
        labels = walk.slots.new(shape[long[0]]) if labels is None else labels
        walk.slots.cut(name, long[0], labels)
        value.labels = labels.reshape([-1 if dim == long[0] else 1 for dim in range(len(shape))])
    else:
        walk.opaque.setdefault(name, "it is used outside of a layer")
    return value


def unify_operands(walk: Walk, operands: list[Value], shape: tuple[int, ...]) -> Tensor:
    """Elements that meet share their slot; an operand of size 1 along the others' slots only broadcasts."""
    ranked = [(with_rank(v.labels, len(shape)), (1,) * (len(shape) - len(v.shape)) + v.shape) for v in operands]
    varying = [dim for dim in range(len(shape)) if any(labels.shape[dim] > 1 for labels, _ in ranked)]
    full = [labels for labels, own in ranked if all(own[dim] == shape[dim] for dim in varying)]
    for labels, own in ranked:
        if any(own[dim] != shape[dim] for dim in varying):
            walk.slots.pin(labels, "it is broadcast along several dimensions")
    if not full and walk.heads.dims is None and varying:
        # Heads come before the positions that a mask is about, and behind the instances that it may be repeated for.
        places = [next((dim for dim in varying if labels.shape[dim] > 1), len(shape)) for labels, _ in ranked]
        first = min(range(len(ranked)), key=lambda item: (walk.heads.are(ranked[item][0]), places[item]))
        return ranked[first][0]
    if not full:  # an outer product: no operand spans all slots
        return torch.full([1] * len(shape), PINNED, dtype=torch.int64)
    for labels in full[1:]:
        walk.slots.unify(full[0], labels)
    return min((labels for labels in full if bool(labels.any())), key=Tensor.numel, default=full[0])


def with_rank(tensor: Tensor, rank: int) -> Tensor:
    """The same with as many dimensions, new ones in front, as in broadcasting."""
    return tensor.reshape([1] * (rank - tensor.ndim) + list(tensor.shape))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys((*ACTIVATIONS, *_POINTWISE, *(f"{name}_" for name in _POINTWISE)), pointwise),
    **dict.fromkeys((*_ANSWERS, *(f"{name}_" for name in _ANSWERS if not name.startswith("_"))), answer),
    **dict.fromkeys(("div", "div_", "divide", "divide_", "true_divide"), partial(pointwise, divides=True)),
    **dict.fromkeys(("add", "add_"), partial(pointwise, adds=True)),
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_"), partial(pointwise, zero_absorbs=True)),
    "addcmul": addcmul,
    **dict.fromkeys(("to", "_to_copy", "type_as"), cast),
    "prelu": prelu,
}
