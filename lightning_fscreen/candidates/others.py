"""Parameters that belong to no candidates, for the list of what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from lightning_fscreen.modules import join


def other_weights(
    model: nn.Module, is_layer: Callable[[nn.Module], bool], noun: str, owners: Mapping[int, str]
) -> dict[str, str]:
    """Parameters of two and more dimensions that belong to no layer with candidates, and why they are left alone.

    Args:
        model: any module.
        is_layer: whether a module is a layer with candidates.
        noun: how candidates are called.
        owners: id of a weight → the layer that is pruned with it.
    """
    reasons = {}
    for name, module in model.named_modules():
        if is_layer(module) or isinstance(module, ParametrizationList):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, UninitializedParameter) or parameter.ndim < 2:
                continue
            kind = type(module).__name__
            reason = f"a parameter of {kind}: only {noun} of linear and convolution layers are candidates"
            if other := owners.get(id(parameter)):
                reason = f"the weight of {other!r}, which {kind} shares"
            reasons[join(name, attribute)] = reason
    return reasons
