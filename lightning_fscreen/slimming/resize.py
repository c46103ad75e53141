"""To the size of a plan and back, for networks whose values are going to be loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_fscreen.modules import join, named_tensors
from lightning_fscreen.slimming.attributes import set_attributes
from lightning_fscreen.slimming.carried import attach_lost_plan, attach_plan, detach_plans, plan_of
from lightning_fscreen.slimming.fits import check_fits
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.rewrite import Undo, install, original_groups
from lightning_fscreen.slimming.select import drop_select, put_select, selected
from lightning_fscreen.slimming.sizes import set_sizes


def slim_like(network: nn.Module, plan: SlimmingPlan) -> None:
    """Make a full-size network as small as a plan says, in place.

    Raises:
        PlanError: the plan does not fit; names the first module that differs. The network is untouched then.
    """
    check_fits(plan, network)
    tensors = named_tensors(network)
    new = {name: plan.cut(name, tensors[name].detach()) for name in plan.cuts}
    for layer in plan.biases:
        weight = network.get_submodule(layer).get_parameter("weight")
        new[join(layer, "bias")] = weight.new_zeros(added_bias_shape(plan, network, layer))
    install(network, plan, new)
    attach_plan(network, plan)


def grow(network: nn.Module) -> Undo:
    """Make a slimmed network as large as it once was, in place; what was cut off is zero.

    Returns:
        A function that undoes it.
    """
    plan = plan_of(network)
    tensors = named_tensors(network)
    new = {name: _spread(tensors[name].detach(), plan, name) for name in plan.cuts}
    biases = {layer: network.get_submodule(layer).get_parameter("bias") for layer in plan.biases}
    for layer in biases:
        network.get_submodule(layer).register_parameter("bias", None)
    now = {layer: network.get_submodule(layer).groups for layer in plan.groups}
    for layer in now:
        module = network.get_submodule(layer)
        module.groups = original_groups(module)  # type: ignore[assignment]
    for name in plan.selects:
        drop_select(network.get_submodule(name))
    undo_attributes = set_attributes(network, plan.attributes, before=True)
    undo_sizes = set_sizes(network, dict.fromkeys(plan.sizes, ()), keep=False)
    undo_install = install(network, SlimmingPlan(), new)
    detach_plans(network)

    def undo() -> None:
        undo_install()
        undo_sizes()
        undo_attributes()
        for layer, bias in biases.items():
            network.get_submodule(layer).bias = bias
        for layer, groups in now.items():
            network.get_submodule(layer).groups = groups
        reattach(network, plan)

    return undo


def _spread(tensor: Tensor, plan: SlimmingPlan, name: str) -> Tensor:
    """A tensor at its size before it was cut: its values where they were, and zeros."""
    for dim, kept in plan.cuts[name].items():
        shape = list(tensor.shape)
        shape[dim] = plan.shapes[name][dim]
        index = torch.tensor(kept, dtype=torch.int64, device=tensor.device)
        tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
    return tensor


def reattach(network: nn.Module, plan: SlimmingPlan) -> None:
    """Restore selects and plans that are lost where batch norms are replaced (by synchronised ones, and back)."""
    for name, indices in plan.selects.items():
        module = network.get_submodule(name)
        if selected(module) is None:
            put_select(module, indices, next(module.parameters()).device)
    attach_lost_plan(network, plan)


def added_bias_shape(plan: SlimmingPlan, network: nn.Module, layer: str) -> tuple[int, ...]:
    """Shape of a bias that a plan adds to a layer of a full-size network."""
    module = network.get_submodule(layer)
    weight = next(name for name, tensor in named_tensors(network).items() if tensor is module.weight)
    shape = planned_shape(plan, weight, named_tensors(network)[weight])
    return (shape[1] * module.groups,) if isinstance(module, _ConvTransposeNd) else shape[:1]


def planned_shape(plan: SlimmingPlan, name: str, tensor: Tensor) -> tuple[int, ...]:
    """Shape that a plan gives to a tensor of a full-size network."""
    shape = list(tensor.shape)
    for dim, kept in plan.cuts.get(name, {}).items():
        shape[dim] = len(kept)
    return tuple(shape)
