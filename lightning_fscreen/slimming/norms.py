"""Gates whose units are the channels of a batch norm, switched off by their scale γ."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen.modules import own_tensors, why_fixed
from lightning_fscreen.slimming.kinds import Kind, register_kind


@register_kind
class NormChannels(Kind):
    """Channels of batch norms."""

    name = "channel"
    layers = "batch norms"
    gate = "scale"

    def is_gate(self, module: nn.Module) -> bool:
        """Batch norms of any number of dimensions, synchronised ones, too."""
        return isinstance(module, _BatchNorm)

    def units(self, module: _BatchNorm) -> int:
        """Number of channels."""
        return int(module.num_features)

    def fixed_reasons(self, modules: Mapping[str, _BatchNorm]) -> dict[str, str]:
        """Without a scale and a shift of their own, or frozen."""
        reasons: dict[str, str] = {}
        owners: dict[int, str] = {}
        for name, module in modules.items():
            weight, shift = own_tensors(module)
            if not module.affine:
                reasons[name] = "it has no scale and shift (affine=False)"
            elif reason := why_fixed(module, owners, "scale"):
                reasons[name] = reason
            elif shift is None:
                reasons[name] = "its shift is missing, or not a parameter of its own"
            else:
                owners[id(weight)] = name
        return reasons

    def dim(self, module: _BatchNorm) -> int:
        """The only one."""
        return 0

    def entries(self, module: nn.Module, units: Tensor) -> Tensor:
        """Every channel has one scale."""
        return units
