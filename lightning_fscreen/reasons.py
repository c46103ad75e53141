"""Why the weight of a layer cannot be pruned, whatever the network does with it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized


def why_fixed(module: nn.Module, owners: Mapping[int, str], noun: str = "weight") -> str | None:
    """Why the parameter `weight` of a layer cannot be pruned; None if it can.

    Args:
        module: a layer with a weight.
        owners: id of a weight → name of the layer that is pruned with it.
        noun: the word for the weight in the reason.
    """
    if is_parametrized(module, "weight"):
        return f"its {noun} is computed by a parametrization"
    weight = module.weight
    if isinstance(weight, UninitializedParameter):
        return f"its {noun} is not initialised; run a batch through the lazy module first"
    if not isinstance(weight, nn.Parameter):
        return f"its {noun} is not a parameter (weight_norm or an older pruning hook replaced it)"
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    if id(weight) in owners:
        return f"shares its {noun} with {owners[id(weight)]!r}, which can be pruned"
    return None
