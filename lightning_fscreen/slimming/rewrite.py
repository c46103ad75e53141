"""Make a network smaller in place, as a plan says, or leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from lightning_fscreen.modules import join, own_tensors, parameters_by_name, put_tensor
from lightning_fscreen.slimming.attributes import set_attributes
from lightning_fscreen.slimming.multihead import match_heads
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.select import put_select
from lightning_fscreen.slimming.sizes import set_sizes

Undo = Callable[[], None]
_GROUPS = "_fscreen_groups"


def install(network: nn.Module, plan: SlimmingPlan, tensors: Mapping[str, Tensor]) -> Undo:
    """Put the new tensors in place and set the layers' sizes to match.

    Dtypes, devices, memory formats and `requires_grad` stay; tensors shared by several modules stay shared.

    Args:
        network: the network to change.
        plan: tells which layers get a bias, other groups or a channel select.
        tensors: new tensors by name, of any floating dtype and device.

    Returns:
        A function that puts everything back. After an error, for want of memory say, everything is back already.
    """
    undo: list[Undo] = []

    def put_back() -> None:
        for step in reversed(undo):
            step()

    try:
        _install(network, plan, tensors, undo)
    except BaseException:
        put_back()
        raise
    return put_back


def _install(network: nn.Module, plan: SlimmingPlan, tensors: Mapping[str, Tensor], undo: list[Undo]) -> None:
    modules = dict(network.named_modules())
    for name in plan.biases:
        module = modules[name]
        bias = nn.Parameter(module.weight.new_zeros(tensors[join(name, "bias")].shape), module.weight.requires_grad)
        undo.append(partial(put_tensor, module, "bias", None))
        module.register_parameter("bias", bias)
    for name, places in parameters_by_name(network).items():
        if name not in tensors:
            continue
        owner, attribute = places[0]
        old = getattr(owner, attribute)
        given = tensors[name]
        new: Tensor = given.to(old.dtype) if old.is_meta else given.to(old)  # what has no values takes those given
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(new.ndim)
        if layout is not None and old.is_contiguous(memory_format=layout) and not old.is_contiguous():
            new = new.contiguous(memory_format=layout)
        if isinstance(old, nn.Parameter):
            new = _parameter_like(old, new)
        for module, place in places:
            undo.append(partial(put_tensor, module, place, old))
            put_tensor(module, place, new)
    for name, groups in plan.groups.items():
        undo.append(_restore(modules[name], "groups"))
        modules[name].__dict__.setdefault(_GROUPS, modules[name].groups)
        modules[name].groups = groups
    undo.append(set_attributes(network, plan.attributes))
    undo.append(set_sizes(network, plan.sizes))
    for name, indices in plan.selects.items():
        device = next(tensor.device for tensor in (*modules[name].parameters(), *modules[name].buffers()))
        undo.append(put_select(modules[name], indices, device))
    for module in modules.values():
        undo += _match_sizes(module) + match_heads(module)


def _parameter_like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter of these values, with the attributes (a learning rate of its own, say) of another.

    Hooks of its gradient come along, too. Those that wait until it is accumulated are for this very parameter:
    optimizers that step in the backward pass.
    """
    new = nn.Parameter(values, old.requires_grad)
    vars(new).update(vars(old))
    if new.requires_grad:
        for hook in (old._backward_hooks or {}).values():  # noqa: SLF001  # torch has no public list of them
            new.register_hook(hook)
    return new


@torch.no_grad()
def overwrite(tensor: Tensor, entries: Tensor, values: Tensor | float) -> Undo:
    """Write values into some entries of a tensor, in place.

    Args:
        tensor: the tensor, of at least one dimension.
        entries: bool, of its shape.
        values: a number, or a tensor of its shape.

    Returns:
        A function that puts everything back; until it is forgotten, it holds the rows with such entries, no others.
    """
    touched = entries.any(tuple(range(1, entries.ndim))) if entries.ndim > 1 else entries
    rows = touched.nonzero().flatten()
    mask = entries.index_select(0, rows).to(tensor.device)
    if isinstance(values, Tensor):
        values = values.detach().index_select(0, rows.to(values.device)).to(tensor)
    places = rows.to(tensor.device)
    old = tensor.detach().index_select(0, places)
    tensor.index_copy_(0, places, torch.where(mask, values, old))

    @torch.no_grad()
    def put_back() -> None:
        tensor.index_copy_(0, places, old)

    return put_back


def original_groups(module: nn.Module) -> int:
    """Groups of a convolution before it was slimmed for the first time."""
    return int(module.__dict__.get(_GROUPS, module.groups))


def _match_sizes(module: nn.Module) -> list[Undo]:
    sizes: dict[str, int] = {}
    weight: Tensor | None = own_tensors(module)[0]
    if weight is None and isinstance(module, _BatchNorm):
        weight = module.running_mean
    if weight is None or isinstance(weight, UninitializedParameter):
        return []
    if isinstance(module, nn.Linear):
        sizes = {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    elif isinstance(module, _ConvNd):
        first, second = weight.shape[:2]
        if isinstance(module, _ConvTransposeNd):
            sizes = {"in_channels": first, "out_channels": second * module.groups}
        else:
            sizes = {"out_channels": first, "in_channels": second * module.groups}
    elif isinstance(module, _BatchNorm):
        sizes = {"num_features": len(weight)}
    elif isinstance(module, nn.Embedding):
        sizes = {"embedding_dim": weight.shape[1]}
    elif isinstance(module, nn.PReLU):
        sizes = {"num_parameters": len(weight)}
    changed = [name for name, size in sizes.items() if getattr(module, name) != size]
    undo = [_restore(module, name) for name in changed]
    for name in changed:
        setattr(module, name, sizes[name])
    return undo


def _restore(module: nn.Module, attribute: str) -> Undo:
    old = getattr(module, attribute)
    return lambda: setattr(module, attribute, old)
