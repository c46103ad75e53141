"""The kinds of gates: what is set to zero in a layer so that one of its outputs becomes a constant.

A kind is one small file. What all kinds share is here and in `gates.py` and `slim.py`: a gate has one unit for each
output of its layer, and a shift, which is the constant that is left when a unit is switched off.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_fscreen.modules import own_tensors
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.slots import Heads


class Kind(ABC):
    """One kind of gates."""

    name: ClassVar[str]
    """What `Gate.kind` says."""
    layers: ClassVar[str]
    """How the layers are called in messages."""
    gate: ClassVar[str]
    """How the tensor is called that is set to zero."""
    alone: ClassVar[bool] = True
    """Whether something goes with a unit; else only with several, and `find_gates` has such gates only if asked."""

    @abstractmethod
    def is_gate(self, module: nn.Module) -> bool:
        """Whether a module is a gate of this kind."""

    @abstractmethod
    def units(self, module: Any) -> int:
        """Number of units of a layer."""

    @abstractmethod
    def fixed_reasons(self, modules: Mapping[str, Any]) -> dict[str, str]:
        """Layers that cannot be switched off, whatever the network does with them, and why."""

    @abstractmethod
    def dim(self, module: Any) -> int:
        """Dimension of the weight along which the units lie."""

    @abstractmethod
    def entries(self, module: nn.Module, units: Tensor) -> Tensor:
        """The entries of the weight that belong to some units, (units,) bool: a mask of the weight's shape."""

    def shift(self, module: nn.Module) -> Tensor | None:
        """The constant that is left of units when their weights are zero, (units,); None without one."""
        return own_tensors(module)[1]

    def lacking(self, module: nn.Module) -> str | None:
        """The tensor that a layer uses, or would need, but does not hold itself."""
        weight, shift = own_tensors(module)
        if weight is None:
            return self.gate
        return "shift" if shift is None and (is_parametrized(module, "bias") or module.bias is not None) else None


KINDS: dict[str, Kind] = {}


def register_kind(kind: type[Kind]) -> type[Kind]:
    """Class decorator that adds a kind of gates.

    Raises:
        ValueError: the name is taken.
    """
    if kind.name in KINDS:
        raise ValueError(f"a kind of gates named {kind.name!r} is registered already; choose another name")
    KINDS[kind.name] = kind()
    return kind


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of gates that a module is; None for other modules."""
    return next((kind for kind in KINDS.values() if kind.is_gate(module)), None)


def switch_of(network: nn.Module, name: str, heads: Mapping[str, Heads]) -> tuple[nn.Module, Kind]:
    """The layer whose weights switch the units of a gate off, and the kind of the gate.

    Args:
        network: the network.
        name: of the gate.
        heads: the heads of the network.
    """
    if name in heads:
        return network.get_submodule(heads[name].projection), KINDS[heads[name].kind]
    module = network.get_submodule(name)
    kind = kind_of(module)
    assert kind is not None
    return module, kind


def off(module: nn.Module, kind: Kind, units: Tensor, silent: bool = False) -> Off:
    """Units of a gate switched off.

    Args:
        module: the layer that switches them off.
        kind: the kind of the gate.
        units: (units,) bool, True where switched off.
        silent: whether their shift is, too; else they go on with the shift that the module has.
    """
    pruned = units.detach().cpu()
    shift = None if silent else kind.shift(module)
    constant = torch.zeros(len(units), dtype=torch.float64) if shift is None else shift.detach().cpu().double()
    return Off(pruned, torch.where(pruned, constant, 0.0))


def parameters_off(module: nn.Module, kind: Kind, units: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """The weight and the shift of a gate, each with the mask, of its shape, of what belongs to some units."""
    weight, shift = own_tensors(module)[0], kind.shift(module)
    both = ((weight, kind.entries(module, units)), (shift, units)) if weight is not None else ((shift, units),)
    return [(parameter, mask) for parameter, mask in both if isinstance(parameter, nn.Parameter)]
