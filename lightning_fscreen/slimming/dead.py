"""Remove units and channels that are left without incoming or without outgoing weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fscreen.slimming.capture import capture, named_tensors
from lightning_fscreen.slimming.liveness import live_slots, removed_constants
from lightning_fscreen.slimming.operators import SlotInterpreter
from lightning_fscreen.slimming.plan import SlimmingPlan, attach_plan, join, parameters_by_name
from lightning_fscreen.slimming.rewrite import install
from lightning_fscreen.slimming.slots import Reader, SlotGraph
from lightning_fscreen.slimming.verify import Verification


def remove_dead_units(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> SlimmingPlan:
    """Physically remove hidden units and channels that do nothing, in place; outputs in eval mode stay the same.

    Units without outgoing weights are removed with all that only they read; units without incoming weights put out a
    constant, which is carried into the biases of the layers that read it. What cannot be removed exactly stays.

    Args:
        network: any module that `torch.export` can capture.
        args: example inputs of its forward, with at least two instances so that no size is 1 by chance.
        kwargs: example keyword inputs.

    Returns:
        The plan that was applied; false if there was nothing to remove.

    Raises:
        CaptureError: the network cannot be captured.
        VerificationError: outputs differ in float64 on the example or on random inputs, or forward fails on the smaller
            network.
        The network is untouched after an error.
    """
    kwargs = dict(kwargs or {})
    slots = SlotInterpreter(network, capture(network, args, kwargs)).run()
    plan, folded = plan_dead(network, slots)
    if not plan:
        return plan
    verification = Verification(network, args, kwargs)
    exact = {name: tensor.detach() for name, tensor in named_tensors(network).items() if name in plan.cuts}
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in exact.items()}
    new = {name: plan.cut(name, tensor) for name, tensor in {**exact, **folded}.items()}
    undo = install(network, plan, new)
    try:
        verification.check(new)
    except BaseException:
        undo()
        raise
    attach_plan(network, plan)
    return plan


def plan_dead(network: nn.Module, slots: SlotGraph) -> tuple[SlimmingPlan, dict[str, Tensor]]:
    """The plan that removes all dead slots, and the weights and biases that take over their constants (float64)."""
    tensors, modules = named_tensors(network), dict(network.named_modules())
    foldable = _foldable(network, slots)
    live, kept = live_slots(slots, foldable)
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), labels in slots.dims.items():
        if not bool(kept[labels].all()):
            cuts.setdefault(name, {})[dim] = tuple(kept[labels].nonzero().flatten().tolist())
    folded: dict[str, Tensor] = {}
    biases = []
    removed: dict[str, int] = {}
    for reader in slots.readers:
        if reader.module is not None and (count := int((~kept[reader.outputs]).sum())):
            removed[reader.module] = count
        gone, carrier = removed_constants(reader, live, kept)
        if not bool(gone.any()):
            continue
        if carrier is not None:
            weight = tensors[reader.weight].detach().double().movedim(reader.input_dim, -1).clone()
            share = (reader.constant / reader.constant[carrier]) * gone
            weight[..., carrier] += weight @ share.to(weight.device)
            folded[reader.weight] = weight.movedim(-1, reader.input_dim)
            continue
        assert reader.module is not None  # it is foldable
        addition = reader.matrix @ torch.where(gone, reader.constant, 0.0)
        if reader.bias is None:  # the new one is not cut by the plan, so it has its final length here
            biases.append(reader.module)
            device = tensors[reader.weight].device
            folded[join(reader.module, "bias")] = addition[kept[reader.outputs]].to(device)
        else:
            old = tensors[reader.bias].detach().double()
            folded[reader.bias] = old + addition.to(old.device)
    groups = {}
    for name, labels in slots.depthwise.items():
        if not bool(kept[labels].all()):
            groups[name] = int(kept[labels].sum())
            removed[name] = len(labels) - groups[name]
    shapes = {name: tuple(tensors[name].shape) for name in cuts}
    removed = {name: removed[name] for name in modules if name in removed}  # in the network's order
    return SlimmingPlan(shapes, cuts, groups, tuple(biases), dict(slots.pinned), removed), folded


def _foldable(network: nn.Module, slots: SlotGraph) -> set[str]:
    """Weights of the layers that can take constants into their bias, which nobody else must use.

    In weights that are read more than once, constants cannot be carried at all: they meet different ones in each call.
    """
    weights = Counter(reader.weight for reader in slots.readers)
    biases = Counter(reader.bias for reader in slots.readers)
    places = parameters_by_name(network)

    def has_own_bias(reader: Reader) -> bool:
        return reader.bias is None or (biases[reader.bias] == 1 and len(places[reader.bias]) == 1)

    for reader in slots.readers:
        if weights[reader.weight] > 1:
            reader.known = reader.known & (reader.constant == 0)
    return {
        reader.weight
        for reader in slots.readers
        if reader.module is not None and not reader.padded and weights[reader.weight] == 1 and has_own_bias(reader)
    }
