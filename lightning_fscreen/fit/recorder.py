"""The network inside a LightningModule: the smallest module that holds all pruned layers, and the inputs it gets."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.modules import uncompiled
from lightning_fscreen.statistics.collector import examined

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
OnCall = Callable[[str, nn.Module, tuple[Any, ...], Mapping[str, Any]], Any]
_INSTANCES = 2  # enough for a batch dimension to be told from a size of 1


def common_parent(model: nn.Module, names: Sequence[str]) -> str:
    """Name of the smallest submodule that holds all modules of these names; "" (`model` itself) if there is none."""
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
    return name


def enclosing(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """A submodule and the modules around it, the outermost (`model` itself) first; without those of torch.compile."""
    parts = name.split(".") if name else []
    names = [".".join(parts[:length]) for length in range(len(parts) + 1)]
    modules = [(outer, model.get_submodule(outer)) for outer in names]
    return [(outer, module) for outer, module in modules if uncompiled(module) is module]


def networks_around(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Names and submodules that may be the network with these layers, from the outermost to the innermost."""
    name = common_parent(model, names)
    around = enclosing(model, name)
    return around[:-1] if name in names and len(around) > 1 else around  # one layer is no network


class InputRecorder:
    """Remembers the first inputs that a network gets in training, cut to a few instances.

    Args:
        networks: names and modules that may be the network, from the outermost to the innermost.
        outermost: whether the network is the outermost one that is called, and not rejected; else the innermost one.
    """

    def __init__(self, networks: Sequence[tuple[str, nn.Module]], outermost: bool = False) -> None:
        self._networks = list(networks)
        self._outermost = outermost
        self.name, self.network = self._networks[-1]
        self.inputs: Inputs | None = None
        self.dtype = torch.float32  # of the parameters when they were recorded
        self.instances = _INSTANCES
        self._handles: list[RemovableHandle] = []

    def restore(self, name: str, network: nn.Module, inputs: Inputs, dtype: torch.dtype) -> None:
        """The network, its inputs, and the dtype of its parameters then, are known from before."""
        self.name, self.network, self.inputs, self.dtype = name, network, inputs, dtype
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
        self.instances = min(len(tensors[0]), _INSTANCES) if tensors else 1

    def start(self, on_call: OnCall | None = None) -> None:
        """Call `on_call`, which calls `record`, before any of these modules runs; by default `record` itself."""
        if not self._handles:
            self._handles = [
                network.register_forward_pre_hook(
                    functools.partial(_call, on_call or self.record, name), with_kwargs=True
                )
                for name, network in self._networks
            ]

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def inputs_on_device(self) -> Inputs:
        """The inputs, as the network would get them now: it may have been moved, or converted to another dtype."""
        parameter = next(self.network.parameters())

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(parameter if tensor.dtype == self.dtype else parameter.device)

        args, kwargs = pytree.tree_map_only(Tensor, move, self.inputs)
        return args, kwargs

    def plain_inputs(self) -> Inputs | None:
        """The inputs, if they are tensors and primitives in tuples, lists and dicts, so that a file may hold them."""
        return self.inputs if _is_plain(self.inputs) else None

    def describe(self) -> str:
        """Name of the network in a message."""
        return f"module {self.name!r}" if self.name else f"{type(self.network).__name__}.forward"

    def record(self, name: str, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Record the inputs of a module that is about to run; returns whether it is the network from now on."""
        deeper = not self._outermost and len(name) > len(self.name)
        # Lightning lets DistributedDataParallel call training_step through a replaced forward.
        if (self.inputs is not None and not deeper) or "forward" in vars(network) or examined.get():
            return False
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        batch_size = len(tensors[0]) if tensors else 0
        self.instances = min(batch_size, _INSTANCES) or 1

        def cut(tensor: Tensor) -> Tensor:
            first = tensor[:_INSTANCES] if tensor.ndim and len(tensor) == batch_size else tensor
            return first.detach().clone()

        self.name, self.network, self.dtype = name, network, next(network.parameters()).dtype
        self.inputs = pytree.tree_map_only(torch.Tensor, cut, (tuple(args), dict(kwargs)))
        return True

    def reject(self) -> bool:
        """Wait for the next module inside to be called instead; returns False if there is none."""
        if self.network is self._networks[-1][1]:
            return False
        self.inputs = None
        return True

    @contextlib.contextmanager
    def examining(self) -> Iterator[None]:
        """Within this context the network runs as it was written, and other callbacks do not take part."""
        tensors = [leaf for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor) and leaf.ndim]
        token = examined.set(True)
        try:
            with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
                yield
        finally:
            examined.reset(token)


def _call(on_call: OnCall, name: str, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    on_call(name, network, args, kwargs)  # without a result, which would replace the inputs


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (Tensor, bool, int, float, str)
