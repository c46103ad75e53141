"""Handlers of the operators that rearrange elements: reshaping, padding, and tensors made on the spot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.slimming.elementwise import vector
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, by_channel, operator_name
from lightning_fscreen.slimming.slots import Value, compress

Arrange = Callable[[Any, Value, Tensor], Tensor]
"""(node, its input, labels or constants of the input as they are stored) → those of the output."""


def reshaped(node: Any, value: Value, part: Tensor) -> Tensor:
    """Dimensions in front that stay, and along which nothing varies, have the size 1 meanwhile."""
    shape = tuple(node.meta["val"].shape)
    if part.numel() == 1:
        return part.reshape([1] * len(shape))
    pairs = zip(shape, value.shape, part.shape, strict=False)
    same = [1 for _ in itertools.takewhile(lambda sizes: sizes[0] == sizes[1] and sizes[2] == 1, pairs)]
    return compress(part.expand([*same, *value.shape[len(same) :]]).reshape([*same, *shape[len(same) :]]))


def transposed(node: Any, value: Value, part: Tensor) -> Tensor:
    """The order of the dimensions changes."""
    return torch.as_tensor(node.target(part.detach(), *node.args[1:], **node.kwargs))  # which may do it in place


def shuffled(node: Any, value: Value, part: Tensor) -> Tensor:
    """Whatever the operator does."""
    return compress(node.target(part.expand(value.shape).contiguous(), *node.args[1:], **node.kwargs))


def move(walk: Walk, node: Any, arrange: Arrange = reshaped) -> Value:
    """Operators that only rearrange elements do it with the labels, too."""
    value = vector(walk, node.args[0])
    given = arguments(node)
    if "dtype" in given:  # view(dtype) cuts elements into pieces
        raise Unsupported("it reads its input as another dtype")
    shape = tuple(node.meta["val"].shape)
    if not bool(value.labels.any()) and not bool(value.known.any()):
        return Value.pinned(shape)
    return Value(shape, *(arrange(node, value, part) for part in value.fields()))


def squeeze(walk: Walk, node: Any) -> Value:
    """As `move`; a dimension that shrinks to 1 would go."""
    value, result = walk.value(node.args[0]), move(walk, node)
    dims = node.args[1] if len(node.args) > 1 else range(len(value.shape))
    for dim in dims if isinstance(dims, list | tuple | range) else [dims]:
        if value.labels.ndim and value.labels.shape[dim] > 1:
            walk.slots.pin(value.labels, "squeeze would drop it if one were left")
    return result


def resize(walk: Walk, node: Any) -> Value:
    """As `move`, to sizes that forward gives for all dimensions."""
    result = move(walk, node)
    respect_sizes(walk, node, result, list(node.args[1]), first=0)
    return result


def unflatten(walk: Walk, node: Any) -> Value:
    """As `move`, to sizes that forward gives for the parts of one dimension."""
    result = move(walk, node)
    rank = len(walk.value(node.args[0]).shape)
    respect_sizes(walk, node, result, list(node.args[2]), node.args[1] % rank, node.args[1] % rank - rank)
    return result


def respect_sizes(walk: Walk, node: Any, result: Value, sizes: list[int], first: int, dim: int | None = None) -> None:
    """Sizes in forward: written as numbers, they stay; computed, all of a split dimension's parts keep the same.

    Args:
        walk: the walk.
        node: the call.
        result: its output, whose labels may be narrowed.
        sizes: of the output's dimensions from `first` on; -1 is free.
        first: the first dimension that they belong to.
        dim: the dimension that the call divides, from the last one.
    """
    varying = [dim for dim, size in enumerate(result.labels.shape) if size > 1]
    if walk.heads.dims is None:
        walk.heads.splits[node.name] = result.labels
        return
    fixed = [dim for dim in varying if first <= dim < first + len(sizes) and sizes[dim - first] != -1]
    free = walk.heads.dims.get(node.name)
    if not fixed and free is None:
        return
    if free is None:
        channels = _channel_dim(node)
        last = channels if channels in varying else varying[-1]
        free = next((dim for dim in varying if dim not in fixed), last)
    counted: dict[int, Tensor | int] = {place: size for place, size in enumerate(sizes) if size != -1}
    if free in fixed:
        counted[free - first] = result.along(free)
    if not walk.is_computed(node, vector(walk, node.args[0]), result, counted=counted, sizes=len(sizes), dim=dim):
        walk.keep_all(node, result.labels, f"{operator_name(node)} has sizes {sizes} written into forward")
        return
    for place in varying:
        if place != free:
            row = result.labels.narrow(place, 0, 1)
            walk.slots.unify(result.labels, row)
            result.labels = row
    if node.name in walk.heads.dims:
        walk.heads.note(result.labels)


def _channel_dim(node: Any) -> int | None:
    """The dimension that a layer takes for the channels, where one reads this very shape."""
    waiting, shape = [node], node.meta["val"].shape
    for reached in waiting:
        for user in reached.users:
            if operator_name(user).startswith(("batch_norm", "conv")):
                return 1
            value = user.meta.get("val")
            if isinstance(value, Tensor) and value.shape == shape and user not in waiting:
                waiting.append(user)
    return None


def moved_along(walk: Walk, node: Any) -> Value:
    """As `move`: positions change their places, along dimensions that are none of channels."""
    value, dims = walk.value(node.args[0]), arguments(node)["dims"]
    if walk.heads.dims is not None and any(value.labels.shape[dim] > 1 for dim in dims or range(len(value.shape))):
        raise Unsupported("it moves channels to other places")
    return move(walk, node, shuffled)


def windows(walk: Walk, node: Any) -> Value:
    """As `move`: overlapping windows of positions, along a new last dimension."""
    value = walk.value(node.args[0])
    if value.labels.shape[arguments(node)["dimension"] % len(value.shape)] > 1:
        raise Unsupported("it takes windows of channels")
    return move(walk, node, shuffled)


def as_complex(walk: Walk, node: Any) -> Value:
    """Pairs along the last dimension become complex numbers, which are no constants here."""
    value = walk.value(node.args[0])
    if value.labels.shape[-1] > 1:
        if walk.heads.dims is not None:
            raise Unsupported("it makes complex numbers of channels")
        value = replace(value, labels=value.labels[..., :1])
    return _unknown(tuple(node.meta["val"].shape), value.labels[..., 0])


def as_real(walk: Walk, node: Any) -> Value:
    """The parts of complex numbers, along a new last dimension."""
    return _unknown(tuple(node.meta["val"].shape), walk.value(node.args[0]).labels.unsqueeze(-1))


def _unknown(shape: tuple[int, ...], labels: Tensor) -> Value:
    return replace(Value.pinned(shape), labels=labels)


def reshape_as(walk: Walk, node: Any) -> Value:
    """As `move`; the channels of the result go with those of the tensor whose shape it takes."""
    value, other = walk.value(node.args[0]), walk.value(node.args[1])
    shape = tuple(node.meta["val"].shape)
    result = Value(shape, *(reshaped(node, value, part) for part in value.fields()))
    walk.slots.unify(result.labels, other.labels)
    return result


def channel_shuffle(walk: Walk, node: Any) -> Value:
    """As `move`; all groups lose the same channels."""
    labels, _, _ = walk.slots.along(walk.value(node.args[0]), 1)
    by_group = labels.reshape(arguments(node)["groups"], -1)
    walk.slots.unify(by_group, by_group[:1])
    return move(walk, node, shuffled)


def pixel_shuffle(walk: Walk, node: Any) -> Value:
    """Some channels become the positions of one: they go together."""
    labels, constant, known = walk.slots.along(walk.value(node.args[0]), 1)
    parts = [part.reshape(-1, arguments(node)["upscale_factor"] ** 2) for part in (labels, constant, known)]
    walk.slots.unify(parts[0], parts[0][:, :1])
    same = parts[2].all(1) & (parts[1] == parts[1][:, :1]).all(1)
    return by_channel(node, 1, parts[0][:, 0], parts[1][:, 0], same)


def pixel_unshuffle(walk: Walk, node: Any) -> Value:
    """Positions of a channel become channels, which go together."""
    every = arguments(node)["downscale_factor"] ** 2
    parts = walk.slots.along(walk.value(node.args[0]), 1)
    return by_channel(node, 1, *(part.repeat_interleave(every) for part in parts))


def pad(walk: Walk, node: Any) -> Value:
    """Positions are added at the border."""
    value = walk.value(node.args[0])
    given = arguments(node)
    widths = given["pad"]  # from the last dimension on, two for each
    padded = [len(value.shape) - 1 - index // 2 for index, width in enumerate(widths) if width]
    if any(value.labels.shape[dim] > 1 for dim in padded):
        raise Unsupported("it adds channels")
    known, border = value.known, given["value"] or 0.0
    # What is padded with -inf and pooled by the maximum is padded with nothing.
    neutral = border == -math.inf and all("max_pool" in operator_name(user) for user in node.users)
    if padded and given["mode"] == "constant" and not neutral:
        known = known & (value.constant == border)
    return Value(tuple(node.meta["val"].shape), value.labels, value.constant, compress(known))


def new(walk: Walk, node: Any) -> Value:
    """A tensor made on the spot; its sizes may depend on its position in the network, so it is not cut."""
    return Value.pinned(tuple(node.meta["val"].shape))


def filled(walk: Walk, node: Any) -> Value:
    """The same number everywhere; it can lose heads, if its size follows."""
    shape = tuple(node.meta["val"].shape)
    value = walk.heads.table(node.name, shape, walk.slots)
    if value is not None and walk.heads.dims is not None and not walk.is_computed(node, value):
        walk.keep_all(node, value.labels, f"{operator_name(node)} has sizes {list(shape)} written into forward")
    return new(walk, node) if value is None else value


def new_like(walk: Walk, node: Any, constant: float | None = None) -> Value:
    """A tensor made on the spot in the shape of another one."""
    value = walk.value(node.args[0])
    filled = torch.full_like(value.constant, constant or 0.0)
    return Value(value.shape, value.labels, filled, torch.full_like(value.known, constant is not None))


def full_like(walk: Walk, node: Any) -> Value:
    """The same number everywhere, in the shape of another tensor."""
    number = arguments(node)["fill_value"]
    return new_like(walk, node, float(number))


def check(walk: Walk, node: Any) -> None:
    """Assertions on tensors, which have no output."""


_TRANSPOSES = """
    permute transpose t numpy_T mT adjoint movedim moveaxis swapaxes swapdims transpose_ t_ swapaxes_ swapdims_
""".split()
_NEW = """
    rand randn arange scalar_tensor
""".split()

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("flatten", "unsqueeze", "unsqueeze_"), move),
    **dict.fromkeys(_TRANSPOSES, partial(move, arrange=transposed)),
    **dict.fromkeys(("squeeze", "squeeze_"), squeeze),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), resize),
    "unflatten": unflatten,
    **dict.fromkeys(("reshape_as", "view_as"), reshape_as),
    **dict.fromkeys(("roll", "flip"), moved_along),
    "unfold": windows,
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    "channel_shuffle": channel_shuffle,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "pad": pad,
    **dict.fromkeys(_NEW, new),
    **dict.fromkeys(("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full"), filled),
    **dict.fromkeys(("empty_like", "rand_like", "randn_like"), new_like),
    "zeros_like": partial(new_like, constant=0.0),
    "ones_like": partial(new_like, constant=1.0),
    "full_like": full_like,
    **dict.fromkeys(("_assert_tensor_metadata", "_assert_scalar"), check),
}
