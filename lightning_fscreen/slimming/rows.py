"""Gates whose units are the outputs of a linear or convolution layer, switched off by their row of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_fscreen.modules import is_transposed_linear, num_outputs, own_tensors, why_fixed
from lightning_fscreen.slimming.kinds import Kind, register_kind


@register_kind
class Neurons(Kind):
    """Hidden units of linear layers and output channels of convolutions."""

    name = "neuron"
    layers = "linear and convolution layers"
    gate = "weight"

    def is_gate(self, module: nn.Module) -> bool:
        """Linear layers and all convolutions."""
        return isinstance(module, nn.Linear | _ConvNd) or is_transposed_linear(module)

    def units(self, module: nn.Module) -> int:
        """Number of outputs."""
        return num_outputs(module)

    def fixed_reasons(self, modules: Mapping[str, Any]) -> dict[str, str]:
        """Without a weight of their own, frozen, or used by attention without being called."""
        reasons: dict[str, str] = {}
        owners: dict[int, str] = {}
        for name, module in modules.items():
            if isinstance(module, NonDynamicallyQuantizableLinear):
                reasons[name] = "attention uses this layer's weight without calling it"
            elif reason := why_fixed(module, owners):
                reasons[name] = reason
            elif self.lacking(module):
                reasons[name] = "its bias is not a parameter of its own"
            else:
                owners[id(module.weight)] = name
        return reasons

    def dim(self, module: nn.Module) -> int:
        """Rows; those of transposed layers stand in the second dimension."""
        return 1 if isinstance(module, _ConvTransposeNd) or is_transposed_linear(module) else 0

    def entries(self, module: nn.Module, units: Tensor) -> Tensor:
        """All weights that lead to the units; those of transposed convolutions stand in the second dimension."""
        weight = own_tensors(module)[0]
        assert weight is not None
        if is_transposed_linear(module):
            return units.expand(weight.shape)
        if not isinstance(module, _ConvTransposeNd):
            return units.reshape(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)
        by_group = units.reshape(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1)
        rows = by_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return rows.expand(weight.shape)
