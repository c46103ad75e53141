"""Handlers of the norms that compute their statistics from every instance by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_fscreen.slimming.interpreter import Handler, Unsupported, Walk, arguments, by_channel, module_of
from lightning_fscreen.slimming.readers import MeanReader
from lightning_fscreen.slimming.slots import Average, Value

_MISSING = object()


def over_all_channels(walk: Walk, node: Any) -> Value:
    """Without one of its channels such a norm divides by something else; but within a head all stay."""
    given = arguments(node)
    value = walk.value(given["input"])
    if any(size > 1 for size in value.labels.shape[-len(given["normalized_shape"]) :]):
        raise Unsupported("it normalises over all channels")
    for name in _names(walk, given, *(key for key in ("weight", "bias") if key in given)).values():
        walk.opaque.setdefault(name, "it is the scale of all heads")
    return Value(value.shape, value.labels, torch.zeros_like(value.constant), torch.zeros_like(value.known))


def group_norm(walk: Walk, node: Any) -> Value:
    """Whole groups can go. One whose inputs are the same constant gives its shift."""
    given = arguments(node)
    groups, module = given["num_groups"], module_of(node)
    if groups == 1:
        raise Unsupported("it normalises over all channels")
    if getattr(walk.modules.get(module), "num_groups", None) != groups or not _is(walk, module, nn.GroupNorm):
        raise Unsupported("the number of its groups is no attribute of an nn.GroupNorm")
    names = _names(walk, given, "weight", "bias")
    labels, constant, known = walk.slots.along(walk.value(given["input"]), 1)
    by_group = labels.reshape(groups, -1)
    walk.slots.unify(by_group, by_group[:, :1])
    for name in names.values():
        walk.slots.cut(name, 0, labels)
    size = by_group.shape[1]
    walk.slots.counts[module] = {"num_groups": (labels, size), "num_channels": (labels, 1)}
    inputs = constant.reshape(groups, size)
    centred = inputs - inputs.mean(1, keepdim=True)
    scale, shift = (walk.tensor(names[key]) if key in names else None for key in ("weight", "bias"))
    out = (centred / (inputs.var(1, keepdim=True, unbiased=False) + given["eps"]).sqrt()).flatten()
    whole = known.reshape(groups, size).all(1, keepdim=True)
    if walk.training and scale is not None:  # training changes it, unless it multiplies zeros
        whole = whole & (centred == 0).all(1, keepdim=True)
    out = out if scale is None else out * scale
    out = out if shift is None else out + shift
    return by_channel(node, 1, labels, out, whole.expand(groups, size).flatten())


def instance_norm(walk: Walk, node: Any) -> Value:
    """Every channel by itself: a constant gives its shift, where no running statistics are used."""
    given = arguments(node)
    module = module_of(node)
    if not _is(walk, module, _InstanceNorm):
        raise Unsupported("it belongs to no layer")
    names = _names(walk, given, "weight", "bias", "running_mean", "running_var")
    labels, constant, known = walk.slots.along(walk.value(given["input"]), 1)
    for name in names.values():
        walk.slots.cut(name, 0, labels)
    walk.slots.counts[module] = {"num_features": (labels, 1)}
    out = walk.tensor(names["bias"]) if "bias" in names else torch.zeros_like(constant)
    if "running_mean" in names:  # eval mode uses them, train mode does not
        known = torch.zeros_like(known)
    return by_channel(node, 1, labels, out, known)


def rms_norm(walk: Walk, node: Any) -> Value:
    """Channels that are always zero can go: y = x · gain / √(Σ x² / D + eps)."""
    given = arguments(node)
    module, shape = module_of(node), tuple(given["normalized_shape"])
    source = walk.value(given["input"])
    if any(dim < -len(shape) for dim in source.varying()):  # heads: all that it normalises over stays
        return over_all_channels(walk, node)
    if len(shape) != 1:
        raise Unsupported("it normalises over several dimensions")
    owner = walk.modules.get(module)
    eps = getattr(owner, "eps", _MISSING)
    if getattr(owner, "normalized_shape", None) != shape or eps != given["eps"] or not isinstance(eps, float | None):
        raise Unsupported("its size and its eps are no attributes of its module")
    names = _names(walk, given, "weight")
    if not names:
        raise Unsupported(
            "it normalises over all channels, and has no gain that could take over what one that goes did"
        )
    labels, constant, known = walk.slots.along(source, -1)
    walk.slots.cut(names["weight"], 0, labels)
    average = Average(labels, module, "eps", names["weight"], power=0.5, size="normalized_shape")
    return by_channel(node, -1, labels, torch.zeros_like(constant), averaged(walk, average, constant, known))


def averaged(walk: Walk, average: Average, constant: Tensor, known: Tensor) -> Tensor:
    """Note a mean over channels, given their constants and which are constant.

    Returns:
        (D,) bool: those that are always zero.
    """
    labels = average.labels
    walk.slots.averages.append(average)
    walk.slots.readers.append(
        MeanReader(layer=average.module, inputs=labels, outputs=labels, constant=constant, known=known)
    )
    return known & (constant == 0)


def _is(walk: Walk, module: str, kind: type[nn.Module]) -> bool:
    return isinstance(walk.modules.get(module), kind)


def _names(walk: Walk, given: dict[str, Any], *keys: str) -> dict[str, str]:
    """Argument → name of the parameter or buffer that is passed for it."""
    names = {key: walk.name(given[key]) for key in keys if given[key] is not None}
    if None in names.values():
        raise Unsupported("one of its tensors is no parameter or buffer")
    return {key: name for key, name in names.items() if name is not None}


HANDLERS: dict[str, Handler] = {
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "rms_norm": rms_norm,
    "layer_norm": over_all_channels,
}
