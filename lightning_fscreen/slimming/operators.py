"""Transfer functions of the operators without weights: how slots and constants pass through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming.interpreter import Handler, Walk, arguments, by_channel, operator_name
from lightning_fscreen.slimming.slots import PINNED, Value, compress

ACTIVATIONS = """
    relu relu_ relu6 relu6_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu silu_ mish mish_ sigmoid
    sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ softplus softsign log_sigmoid
    clamp clamp_ clamp_min clamp_max threshold
""".split()
_POINTWISE = """
    abs neg exp sqrt square pow erf add add_ sub sub_ mul mul_ div div_ rsub maximum minimum clone contiguous alias
    detach detach_ to _to_copy type_as
""".split()
_CASTS = ("to", "_to_copy", "type_as")
_DROPOUT = "dropout dropout_ feature_dropout feature_dropout_ alpha_dropout feature_alpha_dropout".split()
_MOVES = """
    flatten view reshape _unsafe_view unflatten unsqueeze unsqueeze_ squeeze squeeze_ permute transpose t numpy_T
    movedim swapaxes swapdims expand
""".split()
_WITH_SIZES = {"view", "reshape", "_unsafe_view", "unflatten", "expand"}
_POOLS = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
""".split()
_NEW = (
    "empty zeros ones full rand randn arange scalar_tensor empty_like zeros_like ones_like rand_like randn_like".split()
)
_NOISE = "bernoulli bernoulli_ uniform_ normal_".split()


def pointwise(walk: Walk, node: Any) -> Value | None:
    """Elements that meet share their slot; constants are computed."""
    operands = _operands(walk, node)
    if operands is None or not isinstance(node.meta["val"], Tensor):
        return None
    shape = tuple(node.meta["val"].shape)
    labels = _unify_operands(walk, operands, shape)
    known = torch.ones([1] * len(shape), dtype=torch.bool)
    for operand in operands:
        known = known & _with_rank(operand.known, len(shape))
    constant = torch.zeros([1] * len(shape), dtype=torch.float64)
    if operator_name(node) in _CASTS:
        constant = _with_rank(operands[0].constant, len(shape))
    elif bool(known.any()):
        replaced = dict(zip(node.all_input_nodes, operands, strict=True))
        args, kwargs = pytree.tree_map_only(fx.Node, lambda n: replaced[n].constant.clone(), (node.args, node.kwargs))
        constant = _with_rank(node.target(*args, **kwargs).double(), len(shape))
    if operator_name(node) in ("mul", "mul_"):  # zero times anything
        for operand in operands:
            zero = _with_rank(operand.known & (operand.constant == 0), len(shape))
            known, zero = torch.broadcast_tensors(known, zero)
            constant = torch.where(zero, 0.0, constant)
            known = known | zero
    return Value(shape, labels, constant, known)


def _operands(walk: Walk, node: Any) -> list[Value] | None:
    """Values of the tensor arguments of a pointwise operator; a parameter gets slots along its only long dim."""
    values = []
    for source in node.all_input_nodes:
        name, value = walk.name(source), walk.values[source]
        if name is not None and isinstance(value, Value):
            value = _parameter(walk, name)
        if not isinstance(value, Value):
            return None
        values.append(value)
    return values


def _parameter(walk: Walk, name: str) -> Value:
    shape = walk.shape(name)
    ones = [1] * len(shape)
    value = Value.pinned(shape)
    if not walk.training:
        value = Value(shape, value.labels, walk.tensor(name), torch.ones(ones, dtype=torch.bool))
    long = [dim for dim, size in enumerate(shape) if size > 1]
    if len(long) == 1:
        labels = walk.slots.dims.get((name, long[0]))
        labels = walk.slots.new(shape[long[0]]) if labels is None else labels
        walk.slots.cut(name, long[0], labels)
        value.labels = labels.reshape([-1 if dim == long[0] else 1 for dim in range(len(shape))])
    else:
        walk.opaque.setdefault(name, "it is used outside of a layer")
    return value


def _unify_operands(walk: Walk, operands: list[Value], shape: tuple[int, ...]) -> Tensor:
    """Elements that meet share their slot; an operand of size 1 along the others' slots only broadcasts."""
    ranked = [(_with_rank(v.labels, len(shape)), (1,) * (len(shape) - len(v.shape)) + v.shape) for v in operands]
    varying = [dim for dim in range(len(shape)) if any(labels.shape[dim] > 1 for labels, _ in ranked)]
    full = [labels for labels, own in ranked if all(own[dim] == shape[dim] for dim in varying)]
    for labels, own in ranked:
        if any(own[dim] != shape[dim] for dim in varying):
            walk.slots.pin(labels, "it is broadcast along several dimensions")
    if not full:  # an outer product: no operand spans all slots
        return torch.full([1] * len(shape), PINNED, dtype=torch.int64)
    for labels in full[1:]:
        walk.slots.unify(full[0], labels)
    return max(full, key=Tensor.numel)


def prelu(walk: Walk, node: Any) -> Value | None:
    """One slope for all channels, or one for each."""
    source, slope = node.args
    name = walk.name(slope)
    if name is None:
        return None
    value = walk.value(source)
    if walk.shape(name) == (1,):
        walk.opaque.setdefault(name, "it is the slope of all channels")
        silent = value.known & (value.constant == 0)
        return Value(value.shape, value.labels, torch.zeros_like(value.constant), silent)
    labels, constant, known = walk.slots.along(value, 1)
    walk.slots.cut(name, 0, labels)
    return by_channel(node, 1, labels, torch.zeros_like(constant), known & (constant == 0))


def dropout(walk: Walk, node: Any) -> Value:
    """In train mode only zeros are constant, and after alpha dropout nothing is."""
    value = walk.value(node.args[0])
    given = arguments(node)
    if not (given["p"] and (given["train"] or walk.training)):  # the graph of eval mode may stand for both
        return value
    known = value.known & (value.constant == 0)
    if "alpha" in operator_name(node):
        known = torch.zeros_like(known)
    return Value(value.shape, value.labels, value.constant, known)


def noise(walk: Walk, node: Any) -> Value:
    """Random numbers of the same shape."""
    value = walk.value(node.args[0])
    return Value(value.shape, value.labels, value.constant, torch.zeros_like(value.known))


def new(walk: Walk, node: Any) -> Value:
    """A tensor made on the spot; its sizes may depend on its position in the network, so it is not cut."""
    return Value.pinned(tuple(node.meta["val"].shape))


def nothing(walk: Walk, node: Any) -> str:
    """Checks that put nothing out."""
    return operator_name(node)


def move(walk: Walk, node: Any) -> Value | None:
    """Operators that only rearrange elements are run on the labels themselves."""
    value = walk.value(node.args[0])
    shape = tuple(node.meta["val"].shape)
    if not bool(value.labels.any()) and not bool(value.known.any()):
        return Value.pinned(shape)
    moved = [compress(node.target(part.contiguous(), *node.args[1:], **node.kwargs)) for part in value.parts()]
    result = Value(shape, *moved)
    name = operator_name(node)
    if name.startswith("squeeze"):  # a dimension that shrinks to 1 would go
        dims = node.args[1] if len(node.args) > 1 else range(len(value.shape))
        for dim in dims if isinstance(dims, list | tuple | range) else [dims]:
            if value.labels.shape[dim] > 1:
                walk.slots.pin(value.labels, "squeeze would drop it if one were left")
    if name in _WITH_SIZES:
        _respect_sizes(walk, node, value, result)
    return result


def _respect_sizes(walk: Walk, node: Any, value: Value, result: Value) -> None:
    """Sizes in forward: written as numbers, they stay; computed, all of a split dimension's parts keep the same."""
    name = operator_name(node)
    sizes = list(node.args[2] if name == "unflatten" else node.args[1])
    first = node.args[1] % len(value.shape) if name == "unflatten" else 0
    varying = [dim for dim, size in enumerate(result.labels.shape) if size > 1]
    fixed = [dim for dim in varying if first <= dim < first + len(sizes) and sizes[dim - first] != -1]
    if not fixed:
        return
    if walk.literal:
        walk.slots.pin(result.labels, f"{name} has sizes {sizes} written into forward")
        walk.slots.pinned[node.name] = f"{name} has sizes {sizes} written into forward"
        return
    walk.slots.assumed.append(node.name)
    free = next((dim for dim in varying if dim not in fixed), varying[-1])
    for dim in varying:
        if dim != free:
            row = result.labels.narrow(dim, 0, 1)
            walk.slots.unify(result.labels, row)
            result.labels = row


def pieces(walk: Walk, node: Any) -> list[Value] | None:
    """Chunk and split: equal parts keep the same of what they hold, others keep everything."""
    value = walk.value(node.args[0])
    given = arguments(node)
    dim = given["dim"] % len(value.shape)
    shapes = [tuple(part.shape) for part in node.meta["val"]]
    sizes = [shape[dim] for shape in shapes]
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    parts = [
        [part if part.shape[dim] == 1 else part.narrow(dim, start, size) for part in _fields(value)]
        for start, size in zip(starts, sizes, strict=True)
    ]
    if value.labels.shape[dim] > 1:
        if operator_name(node) != "chunk":
            _halve(walk, node, value, [part[0] for part in parts])
        elif len(set(sizes)) > 1:
            walk.slots.pin(value.labels, "chunk makes unequal parts of it")
        else:
            _match(walk, [part[0] for part in parts])
    return [Value(shape, *map(compress, part)) for shape, part in zip(shapes, parts, strict=True)]


def _halve(walk: Walk, node: Any, value: Value, labels: list[Tensor]) -> None:
    """Split sizes: equal ones may be computed from the input's shape."""
    if walk.literal or len({part.shape for part in labels}) > 1:
        walk.slots.pin(value.labels, f"{operator_name(node)} has sizes written into forward")
        walk.slots.pinned[node.name] = f"{operator_name(node)} has sizes written into forward"
    else:
        walk.slots.assumed.append(node.name)
        _match(walk, labels)


def _match(walk: Walk, labels: list[Tensor]) -> None:
    for part in labels[1:]:
        walk.slots.unify(labels[0], part)


def slice_(walk: Walk, node: Any) -> Value | None:
    """A range of one dimension; halves of the channels keep the same of what they hold, other ranges everything."""
    value = walk.value(node.args[0])
    given = arguments(node)
    dim, step = given["dim"] % len(value.shape), given["step"]
    size = value.shape[dim]
    start, stop, _ = slice(given["start"], given["end"], step).indices(size)
    shape = tuple(node.meta["val"].shape)
    parts = [
        part if part.shape[dim] == 1 else part[(slice(None),) * dim + (slice(start, stop, step),)]
        for part in _fields(value)
    ]
    if value.labels.shape[dim] > 1 and shape[dim] != size:
        half = size % 2 == 0 and step == 1 and (start, stop) in ((0, size // 2), (size // 2, size))
        whole = value.labels
        _halve(walk, node, value, list(whole.chunk(2, dim)) if half else [whole.narrow(dim, 0, 1), whole])
    return Value(shape, *map(compress, parts))


def cat(walk: Walk, node: Any) -> Value | None:
    """One after another."""
    values = [walk.value(source) for source in node.args[0]]
    values = [value for value in values if value.shape != (0,)]
    rank = len(values[0].shape)
    dim = arguments(node)["dim"] % rank
    joined = []
    for parts in zip(*(_fields(value) for value in values), strict=True):
        shared = [max(part.shape[other] for part in parts) for other in range(rank)]
        sized = [
            part.expand([value.shape[dim] if other == dim else shared[other] for other in range(rank)])
            for part, value in zip(parts, values, strict=True)
        ]
        joined.append(compress(torch.cat(sized, dim)))
    return Value(tuple(node.meta["val"].shape), *joined)


def pool(walk: Walk, node: Any) -> Value | list[Value]:
    """Windows over positions: slots and constants go through, but for zero padding that is averaged in."""
    value = walk.value(node.args[0])
    result = node.meta["val"]
    dim = len(value.shape) - _rank(operator_name(node)) - 1
    labels, constant, known = walk.slots.along(value, dim)
    if "avg_pool" in operator_name(node) and "adaptive" not in operator_name(node):
        given = arguments(node)
        padding = given["padding"]
        if any(padding if isinstance(padding, list | tuple) else [padding]) or given.get("divisor_override"):
            known = known & (constant == 0)
    pooled = by_channel(node, dim, labels, constant, known)
    if isinstance(result, Tensor):
        return pooled
    # Indices of the largest: positions, which differ by channel.
    unknown = by_channel(node, dim, labels, torch.zeros_like(constant), torch.zeros_like(known))
    return [pooled, unknown]


def _rank(name: str) -> int:
    return next(int(character) for character in name if character in "123")


def expand_as(walk: Walk, node: Any) -> Value:
    """Broadcast to the shape of another tensor, whatever that is."""
    value = walk.value(node.args[0])
    shape = tuple(node.meta["val"].shape)
    return Value(shape, *(_with_rank(part, len(shape)) for part in _fields(value)))


def pad(walk: Walk, node: Any) -> Value | None:
    """Positions are added at the border."""
    value = walk.value(node.args[0])
    given = arguments(node)
    padded = range(len(value.shape) - len(given["pad"]) // 2, len(value.shape))
    if any(value.labels.shape[dim] > 1 for dim in padded):
        return None
    known = value.known
    if given.get("mode", "constant") == "constant":
        known = known & (value.constant == (given.get("value") or 0.0))
    return Value(tuple(node.meta["val"].shape), value.labels, value.constant, compress(known))


def reduce(walk: Walk, node: Any) -> Value | None:
    """mean, sum, amax, amin over positions."""
    value = walk.value(node.args[0])
    given = arguments(node)
    dims = given.get("dim")
    dims = range(len(value.shape)) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    dims = [dim % len(value.shape) for dim in dims]
    parts = [value.labels, *torch.broadcast_tensors(value.constant, value.known)]
    if any(part.shape[dim] > 1 for part in parts for dim in dims):
        return None
    if operator_name(node) == "sum":  # of as many as there are positions
        parts[2] = parts[2] & (parts[1] == 0)
    if not given.get("keepdim"):
        parts = [part.squeeze(dims) for part in parts]
    return Value(tuple(node.meta["val"].shape), *parts)


def _fields(value: Value) -> tuple[Tensor, Tensor, Tensor]:
    return value.labels, value.constant, value.known


def _with_rank(tensor: Tensor, rank: int) -> Tensor:
    return tensor.reshape([1] * (rank - tensor.ndim) + list(tensor.shape))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys((*ACTIVATIONS, *_POINTWISE), pointwise),
    **dict.fromkeys(_DROPOUT, dropout),
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(_POOLS, pool),
    **dict.fromkeys(_NEW, new),
    **dict.fromkeys(_NOISE, noise),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), pieces),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduce),
    **dict.fromkeys(("_assert_tensor_metadata", "_assert_scalar"), nothing),
    "slice": slice_,
    "prelu": prelu,
    "expand_as": expand_as,
    **dict.fromkeys(("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"), pool),
    "cat": cat,
    "pad": pad,
}
