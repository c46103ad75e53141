"""Handlers of the operators that combine positions: pooling, upsampling, sums and means."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.slimming.elementwise import pointwise
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, by_channel, operator_name
from lightning_fscreen.slimming.slots import Value


def pool(walk: Walk, node: Any, rank: int, averages: bool = False) -> Value | list[Value]:
    """Windows over positions: slots and constants pass through, except where zero padding is averaged in.

    Args:
        walk: the walk.
        node: the call.
        rank: number of dimensions that are positions, the last ones.
        averages: whether windows are averaged with their padding, or divided by a number that the call gives.
    """
    value = walk.value(node.args[0])
    dim = len(value.shape) - rank - 1
    labels, constant, known = walk.slots.along(value, dim)
    if averages:
        given = arguments(node)
        padding = given["padding"] if given["count_include_pad"] else 0
        if any(padding if isinstance(padding, list | tuple) else [padding]) or given.get("divisor_override"):
            known = known & (constant == 0)
    pooled = by_channel(node, dim, labels, constant, known)
    if isinstance(node.meta["val"], Tensor):
        return pooled
    # Indices of the largest: positions, which differ by channel.
    return [pooled, by_channel(node, dim, labels, torch.zeros_like(constant), torch.zeros_like(known))]


def reduce(walk: Walk, node: Any, adds: bool = False) -> Value:
    """Mean or extremum over positions; or their sum, which depends on how many they are."""
    value = walk.value(node.args[0])
    given = arguments(node)
    rank = len(value.shape)
    dims = given.get("dim")
    dims = range(rank) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    dims = [dim % rank for dim in dims] if rank else []
    if any(value.labels.shape[dim] > 1 for dim in dims):
        if not node.users:  # attention weights that are averaged over the heads for nobody
            return Value.pinned(tuple(node.meta["val"].shape))
        raise Unsupported("it mixes channels")
    constant, known = torch.broadcast_tensors(value.constant, value.known)
    branches = [dim for dim in dims if constant.shape[dim] > 1]  # of a stack; the others are positions
    if branches:
        constant = node.target(constant, branches, keepdim=True)
        known = known.all(branches, keepdim=True)
    elif adds:
        known = known & (constant == 0)
    parts = [value.labels, constant, known]
    if not given.get("keepdim"):
        parts = [part.squeeze(dims) for part in parts]
    return Value(tuple(node.meta["val"].shape), *parts)


def extremum(walk: Walk, node: Any) -> Value | list[Value]:
    """Of two tensors; or over positions, with the places where it was found if it is along one dimension."""
    given = arguments(node)
    if "other" in given:
        return pointwise(walk, node)
    value = walk.value(node.args[0])
    rank = len(value.shape)
    dims = [given["dim"] % rank] if "dim" in given else list(range(rank))
    if any(value.labels.shape[dim] > 1 for dim in dims):
        raise Unsupported("it mixes channels")
    known, constant = torch.broadcast_tensors(value.known, value.constant)
    over = torch.amax if operator_name(node) == "max" else torch.amin
    labels, constant, known = value.labels, over(constant, dims, keepdim=True), known.all(dims, keepdim=True)
    if not given.get("keepdim"):
        labels, constant, known = (field.squeeze(dims) for field in (labels, constant, known))
    if "dim" not in given:
        return Value((), labels, constant, known)
    shape = tuple(node.meta["val"][0].shape)
    return [Value(shape, labels, constant, known), Value(shape, labels, constant, torch.zeros_like(known))]


def length(walk: Walk, node: Any) -> Value:
    """The norm over positions, or over what goes as one; zero where all of them are, whatever their number."""
    value, given = walk.value(node.args[0]), arguments(node)
    rank = len(value.shape)
    dims = [dim % rank for dim in (range(rank) if given["dim"] is None else given["dim"])]
    if any(value.labels.shape[dim] > 1 for dim in dims):
        raise Unsupported("it mixes channels")
    known, constant = torch.broadcast_tensors(value.known, value.constant)
    silent = (known & (constant == 0)).all(dims, keepdim=True)
    fields = [value.labels, torch.zeros(silent.shape, dtype=torch.float64), silent]
    if not given["keepdim"]:
        fields = [field.squeeze(dims) for field in fields]
    return Value(tuple(node.meta["val"].shape), *fields)


def softmax(walk: Walk, node: Any) -> Value:
    """Over positions, or over the branches of a stack."""
    value = walk.value(node.args[0])
    if value.labels.shape[arguments(node)["dim"]] > 1:
        raise Unsupported("it normalises over all channels")
    return Value(value.shape, value.labels, torch.zeros_like(value.constant), torch.zeros_like(value.known))


def sample(walk: Walk, node: Any) -> Value:
    """Values between positions, wherever these are; beyond the border there may be zeros."""
    labels, constant, known = walk.slots.along(walk.value(node.args[0]), 1)
    walk.pin(node.args[1], "it says where another activation is read")
    return by_channel(node, 1, labels, constant, known & (constant == 0))


def _pools(names: str, averages: bool = False) -> dict[str, Handler]:
    """Handlers of operators for one, two and three dimensions of positions; {} stands for their number."""
    return {
        name.format(rank): partial(pool, rank=rank, averages=averages) for name in names.split() for rank in (1, 2, 3)
    }


HANDLERS: dict[str, Handler] = {
    **_pools("max_pool{}d max_pool{}d_with_indices adaptive_max_pool{}d adaptive_avg_pool{}d upsample_nearest{}d"),
    **_pools("avg_pool{}d", averages=True),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d"), partial(pool, rank=2)),
    **dict.fromkeys(("amax", "amin"), reduce),
    **dict.fromkeys(("max", "min"), extremum),
    "sum": partial(reduce, adds=True),
    "linalg_vector_norm": length,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), sample),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
}
