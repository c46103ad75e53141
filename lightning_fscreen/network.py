"""The network inside a LightningModule: the smallest module that holds all pruned layers, and the inputs it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_INSTANCES = 2  # enough for a batch dimension to be told from a size of 1


def common_parent(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module]:
    """The smallest submodule that holds all modules of these names; `model` itself if there is no smaller one."""
    paths = [name.split(".") for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    name = ".".join(shared)
    module = model.get_submodule(name)
    while name and type(module).forward is nn.Module.forward:  # ModuleList and the like are never called
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
    return name, module


class InputRecorder:
    """Remembers the first inputs that a network gets in training, cut to a few instances.

    Args:
        name: the network's name, for messages.
        network: the module to watch.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name = name
        self.network = network
        self.inputs: Inputs | None = None
        self.instances = _INSTANCES
        self._handle: RemovableHandle | None = None

    def start(self) -> None:
        """Watch for the next call."""
        if self._handle is None:
            self._handle = self.network.register_forward_pre_hook(self._record, with_kwargs=True)

    def stop(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def inputs_on_device(self) -> Inputs:
        """The inputs, on the device where the network is now."""
        device = next(self.network.parameters()).device
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), self.inputs)
        return args, kwargs

    def describe(self) -> str:
        """How to name the network in a message."""
        return f"module {self.name!r}" if self.name else f"{type(self.network).__name__}.forward"

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.inputs is not None:
            return
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        batch_size = len(tensors[0]) if tensors else 0
        self.instances = min(batch_size, _INSTANCES) or 1

        def cut(tensor: Tensor) -> Tensor:
            first = tensor[:_INSTANCES] if tensor.ndim and len(tensor) == batch_size else tensor
            return first.detach().clone()

        self.inputs = pytree.tree_map_only(torch.Tensor, cut, (tuple(args), dict(kwargs)))
