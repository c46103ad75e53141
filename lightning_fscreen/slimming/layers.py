"""Handlers of the layers with weights: linear, convolution, batch norm."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen.slimming.elementwise import operand_of
from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, by_channel, module_of
from lightning_fscreen.slimming.readers import DenseReader, GroupedReader, NormReader
from lightning_fscreen.slimming.select import SELECT, selected
from lightning_fscreen.slimming.slots import PINNED, Stream, Value


def linear(walk: Walk, node: Any) -> Value:
    """Features are the last dimension."""
    given = arguments(node)
    part = walk.values[given["weight"]]
    weight, rows = part.rows if isinstance(part, Value) and part.rows else (walk.name(given["weight"]), None)
    if weight is None:
        raise Unsupported("its weight is no parameter")
    if len(walk.shape(weight)) != 2:
        raise Unsupported("its weight is no matrix")
    bias = walk.name(given["bias"])
    if rows is None and (shared := _on_heads(walk, node, -1)) is not None:
        return shared
    if rows is None and (bias is not None or given["bias"] is None):
        return _dense(walk, node, node.args[0], weight, bias, channel_dim=-1)
    return _parts_of_dense(walk, node, weight, rows or slice(None), given["bias"])


def _on_heads(walk: Walk, node: Any, channel_dim: int) -> Value | None:
    """What a layer gives that is applied to every head by itself, as to instances of a batch; None for others."""
    value, given = walk.value(node.args[0]), arguments(node)
    dim = channel_dim % len(value.shape)
    varying = [other for other, size in enumerate(value.labels.shape) if size > 1 and other != dim]
    if not varying or max(varying) > dim:
        return None
    by_head = value.labels.shape[dim] == 1 and walk.heads.are(value.labels)
    if not (_of_one_layer(walk, value.labels) if walk.heads.dims is None else by_head):
        return None
    names = [walk.name(given[key]) for key in ("weight", "bias") if given[key] is not None]
    if None in names:
        return None
    walk.opaque |= dict.fromkeys(filter(None, names), "all heads share it")
    labels = value.labels.narrow(dim, 0, 1)
    walk.slots.products[str(names[0])] = labels.flatten()
    return replace(Value.pinned(tuple(node.meta["val"].shape)), labels=labels)


def _of_one_layer(walk: Walk, labels: Tensor) -> bool:
    """Whether slots are outputs of the same layer: they lie along several dimensions where it was taken apart."""
    if not bool(labels.any()):
        return False
    first, last = int(labels[labels != PINNED].min()), int(labels.max())
    made = (reader.outputs for reader in walk.slots.readers)
    return any(int(own.min()) <= first and last <= int(own.max()) for own in made)


def _parts_of_dense(walk: Walk, node: Any, weight: str, rows: slice, bias: Any) -> Value:
    """Some rows of a weight, or a bias that is computed from parameters: nobody can take a constant."""
    labels, constant, known = walk.slots.along(walk.value(node.args[0]), -1)
    all_rows = walk.slots.dims.get((weight, 0))
    all_rows = walk.slots.new(walk.shape(weight)[0]) if all_rows is None else all_rows
    walk.slots.multiply(weight, all_rows, labels)
    outputs = all_rows[rows]
    if bias is not None:
        walk.slots.unify(outputs, walk.slots.along(operand_of(walk, bias), 0)[0])
    walk.slots.readers.append(
        DenseReader(
            layer=weight,
            inputs=labels,
            outputs=outputs,
            constant=constant,
            known=known,
            module=None,
            weight=weight,
            bias=None,
            nonzero=None if walk.training else walk.tensor(weight)[rows] != 0,
            padded=False,
        )
    )
    owners = [name for name, _ in walk.layers.get(weight, [])]
    unknown = torch.zeros(len(outputs), dtype=torch.float64), torch.zeros(len(outputs), dtype=torch.bool)
    return by_channel(node, -1, outputs, *_switched(walk, owners if rows == slice(None) else [], outputs, *unknown))


def product(walk: Walk, node: Any) -> Value:
    """Times a parameter that is a matrix, (in, out): a linear layer that is written as a product."""
    given = arguments(node)
    source, matrix = (given[key] for key in (("mat1", "mat2") if "mat1" in given else list(given)[:2]))
    weight, bias = walk.name(matrix), walk.name(given["self"]) if "mat1" in given else None
    if weight is None or len(walk.shape(weight)) != 2:
        raise Unsupported
    if "mat1" in given and (bias is None or given["beta"] != 1 or given["alpha"] != 1):
        raise Unsupported("what is added is no parameter")
    return _dense(walk, node, source, weight, bias, channel_dim=-1, transposed=True)


def convolution(walk: Walk, node: Any, transposed: bool = False) -> Value:
    """Channels are the dimension before the positions, with or without a batch."""
    given = arguments(node)
    weight, bias = _parameters(walk, node)
    shape = walk.shape(weight)
    padding, groups = given["padding"], given["groups"]
    padded = transposed or (padding != "valid" if isinstance(padding, str) else any(padding))
    channel_dim = 1 if len(walk.value(node.args[0]).shape) == len(shape) else 0
    if (shared := _on_heads(walk, node, channel_dim)) is not None:
        return shared
    if groups == 1:
        return _dense(walk, node, node.args[0], weight, bias, channel_dim, padded, transposed)
    if not walk.layers.get(weight):
        raise Unsupported("its weight belongs to no layer")
    per_group = shape[0] // groups if transposed else shape[1]
    grouped = _depthwise if per_group == 1 else _grouped
    return grouped(walk, node, weight, bias, channel_dim, padded, transposed)


def _parameters(walk: Walk, node: Any) -> tuple[str, str | None]:
    """Names of the weight and the bias."""
    given = arguments(node)
    weight, bias = walk.name(given["weight"]), walk.name(given["bias"])
    if weight is None:
        raise Unsupported("its weight is no parameter")
    if bias is None and given["bias"] is not None:
        raise Unsupported("its bias is no parameter")
    return weight, bias


def _dense(
    walk: Walk,
    node: fx.Node,
    source: Any,
    weight: str,
    bias: str | None,
    channel_dim: int,
    padded: bool = False,
    transposed: bool = False,
) -> Value:
    """Linear and ungrouped convolution: its outputs are new slots, its inputs are read."""
    input_dim = 1 if not transposed else 0
    outputs = walk.slots.new(walk.shape(weight)[1 - input_dim])
    broadcast = bias is not None and walk.shape(bias) in ((), (1,)) and len(outputs) > 1  # one bias for all
    if bias is not None and not broadcast and walk.shape(bias) != (len(outputs),):
        raise Unsupported("its bias is no vector of as many elements as it has outputs")
    labels, constant, known = walk.slots.along(walk.value(source), channel_dim)
    walk.slots.multiply(weight, *((labels, outputs) if transposed else (outputs, labels)))
    if bias is not None and broadcast:
        walk.opaque.setdefault(bias, "it is the bias of all units")
    elif bias is not None:
        walk.slots.cut(bias, 0, outputs)
    nonzero = None
    out_constant = torch.zeros(len(outputs), dtype=torch.float64)
    out_known = torch.zeros(len(outputs), dtype=torch.bool)
    if not walk.training:
        kernels = walk.tensor(weight).movedim(input_dim, 1)
        kernels = kernels.reshape(*kernels.shape[:2], -1)
        nonzero = (kernels != 0).any(2)
        carried = known & (constant == 0) if padded else known
        out_known = ~(nonzero & ~carried).any(1)
        out_constant = kernels.sum(2) @ torch.where(carried, constant, 0.0)
        out_constant += 0.0 if bias is None else walk.tensor(bias)
    owners = [name for name, own_bias in walk.layers.get(weight, []) if own_bias == bias and not broadcast]
    out_constant, out_known = _switched(walk, owners, outputs, out_constant, out_known)
    walk.slots.readers.append(
        DenseReader(
            layer=owners[0] if owners else weight,
            inputs=labels,
            outputs=outputs,
            constant=constant,
            known=known,
            module=owners[0] if len(owners) == 1 else None,
            weight=weight,
            bias=bias,
            nonzero=nonzero,
            padded=padded,
            input_dim=input_dim,
            called=module_of(node) in owners,
        )
    )
    return by_channel(node, channel_dim, outputs, out_constant, out_known)


def _grouped(
    walk: Walk, node: fx.Node, weight: str, bias: str | None, channel_dim: int, padded: bool, transposed: bool
) -> Value:
    """Groups keep the same channels each, since one index list cuts them all."""
    labels, constant, known = walk.slots.along(walk.value(node.args[0]), channel_dim)
    groups = arguments(node)["groups"]
    by_group = labels.reshape(groups, -1)
    walk.slots.unify(by_group, by_group[:1])
    shape = walk.shape(weight)
    outputs = walk.slots.new(shape[1] if transposed else shape[0] // groups).repeat(groups)
    flat, within = (labels, outputs[: shape[1]]) if transposed else (outputs, by_group[0])
    walk.slots.multiply(weight, flat, within)
    if bias is not None:
        walk.slots.cut(bias, 0, outputs)
    walk.slots.readers.append(
        GroupedReader(
            layer=walk.layers[weight][0][0],
            inputs=labels,
            outputs=outputs,
            constant=constant,
            known=known,
            groups=groups,
        )
    )
    owners = [name for name, _ in walk.layers[weight]]
    unknown = torch.zeros(len(outputs), dtype=torch.float64), torch.zeros(len(outputs), dtype=torch.bool)
    return by_channel(node, channel_dim, outputs, *_switched(walk, owners, outputs, *unknown))


def _depthwise(
    walk: Walk, node: fx.Node, weight: str, bias: str | None, channel_dim: int, padded: bool, transposed: bool
) -> Value:
    """One input channel per group: its slot passes on to all output channels of the group."""
    labels, constant, known = walk.slots.along(walk.value(node.args[0]), channel_dim)
    spread = node.meta["val"].shape[channel_dim] // len(labels)
    outputs, constant, known = (part.repeat_interleave(spread) for part in (labels, constant, known))
    walk.slots.multiply(weight, labels if transposed else outputs)
    walk.slots.depthwise.update({name: labels for name, _ in walk.layers[weight]})
    if bias is not None:
        walk.slots.cut(bias, 0, outputs)
    kernels = walk.tensor(weight).reshape(len(outputs), -1)
    carried = known & (constant == 0) if padded else known
    out_known = carried if walk.training else carried | (kernels == 0).all(1)
    out_constant = kernels.sum(1) * torch.where(carried, constant, 0.0)
    if bias is not None:
        out_constant += walk.tensor(bias)
        if walk.training:
            walk.slots.trained.append(outputs)
    owners = [name for name, _ in walk.layers[weight]]
    return by_channel(node, channel_dim, outputs, *_switched(walk, owners, outputs, out_constant, out_known))


def _switched(walk: Walk, owners: list[str], outputs: Tensor, constant: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Constants of a layer's outputs, with those that are switched off; notes whose outputs they are."""
    walk.slots.layers |= dict.fromkeys(owners, outputs)
    gate = next((name for name in owners if walk.off is not None and name in walk.off), None)
    if walk.off is None or gate is None:
        return constant, known
    walk.slots.gates[gate] = outputs
    off = walk.off[gate]
    return torch.where(off.pruned, off.constant, constant), known | off.pruned


def batch_norm(walk: Walk, node: Any) -> Value:
    """Its outputs are new slots: channels of a stream that a batch norm does not use may still be read by others."""
    given = arguments(node)
    source, tensors = given["input"], [given[key] for key in ("weight", "bias", "running_mean", "running_var")]
    names = [walk.name(tensor) for tensor in tensors]
    if any((name is None) != (tensor is None) for name, tensor in zip(names, tensors, strict=True)):
        raise Unsupported("one of its tensors is no parameter or buffer")
    if given["training"] and not walk.training:
        raise Unsupported("it normalises with the statistics of the batch in eval mode")
    labels, constant, known = walk.slots.along(walk.value(source), 1)
    present = [name for name in names if name is not None]
    if not present:
        return by_channel(node, 1, labels, torch.zeros_like(constant), torch.zeros_like(known))
    module = present[0].rpartition(".")[0]
    outputs = walk.slots.new(len(labels))
    for name in present:
        walk.slots.cut(name, 0, outputs)
    stream = Stream(walk.streams.get(source, labels), _select(walk, module, len(labels)))
    if module in walk.slots.gates or not isinstance(walk.modules[module], _BatchNorm):  # cannot select for every call
        walk.slots.unify(outputs, labels)
        walk.slots.streams.pop(module, None)
        for reader in walk.slots.readers:
            if reader.layer == module:
                walk.slots.unify(reader.inputs, reader.outputs)
    else:
        walk.slots.streams[module] = stream
    walk.slots.gates[module] = outputs
    off = None if walk.off is None else walk.off.get(module)
    silenced = torch.zeros_like(known) if off is None else off.pruned
    walk.slots.readers.append(
        NormReader(layer=module, inputs=labels, outputs=outputs, constant=constant, known=known, off=silenced)
    )
    if walk.off is not None:
        if off is None:
            return by_channel(node, 1, outputs, torch.zeros_like(constant), torch.zeros_like(known))
        return by_channel(node, 1, outputs, torch.where(off.pruned, off.constant, 0.0), off.pruned)
    scale, offset, mean, variance = (walk.tensor(name) if name is not None else None for name in names)
    if mean is None or variance is None:
        return by_channel(node, 1, outputs, torch.zeros_like(constant), torch.zeros_like(known))
    scale = torch.ones_like(mean) if scale is None else scale
    offset = torch.zeros_like(mean) if offset is None else offset
    normalised = torch.where(known, (constant - mean) / (variance + given["eps"]).sqrt(), 0.0)
    return by_channel(node, 1, outputs, normalised * scale + offset, known | (scale == 0))


def select_stream(walk: Walk, node: Any) -> Value:
    """Our own channel select in front of a batch norm; anybody else's index stays unknown."""
    source, dim, index = node.args
    name = walk.name(index)
    if dim != 1 or name is None or name.rpartition(".")[2] != SELECT:
        raise Unsupported
    labels, constant, known = walk.slots.along(walk.value(source), 1)
    chosen = walk.tensor(name).long()
    walk.streams[node] = labels
    return by_channel(node, 1, labels[chosen], constant[chosen], known[chosen])


def _select(walk: Walk, module: str, channels: int) -> Tensor:
    index = selected(walk.modules[module])
    return torch.arange(channels) if index is None else index.cpu()


HANDLERS: dict[str, Handler] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "addmm"), product),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), partial(convolution, transposed=True)
    ),
    "batch_norm": batch_norm,
    "index_select": select_stream,
}
