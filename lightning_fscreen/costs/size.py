"""The size of a network and of its layers: parameters and multiply–accumulate operations."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_fscreen.costs.operations import operation_counter
from lightning_fscreen.modules import evaluating, join, same_attributes


@dataclass(frozen=True)
class LayerSize:
    """What one module has and does itself, apart from its submodules.

    Attributes:
        params: number of its parameter values; shared ones count where they are met first.
        macs: multiply–accumulate operations of one instance; None if no input was seen.
    """

    params: int
    macs: int | None


@dataclass(frozen=True)
class Size:
    """Size of a network.

    Attributes:
        params: number of parameter values.
        nonzero: those that are not zero.
        macs: multiply–accumulate operations of one instance, as dense layers compute them; None if no input was seen.
        layers: the modules with parameters or operations of their own, by name in the order of the network.
        latency: nanoseconds of a forward pass; None if they were not measured.
    """

    params: int
    nonzero: int
    macs: int | None
    layers: Mapping[str, LayerSize] = field(default_factory=dict, repr=False, compare=False)
    latency: int | None = field(default=None, repr=False)


def add_sizes(sizes: Sequence[Size]) -> Size:
    """Size of several networks together; operations are known if all of theirs are."""
    macs, latency = _sum([size.macs for size in sizes]), _sum([size.latency for size in sizes])
    layers = {name: layer for size in sizes for name, layer in size.layers.items()}
    return Size(sum(size.params for size in sizes), sum(size.nonzero for size in sizes), macs, layers, latency)


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def measure_size(
    network: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None, instances: int, name: str = ""
) -> Size:
    """Size of a network now.

    Args:
        network: the network.
        inputs: arguments and keyword arguments of its forward, to count operations with; None to leave them out.
        instances: number of instances in `inputs`.
        name: of the network, before the names of its layers.
    """
    parameters = list(network.parameters())
    operations: Counter[nn.Module] = Counter()
    macs = None
    if inputs is not None:
        counter = operation_counter()
        with contextlib.ExitStack() as stack:
            for context in (evaluating(network), same_attributes(network), _constant(parameters), counter):
                stack.enter_context(context)
            stack.enter_context(_counting_by_module(network, counter, operations))
            network(*inputs[0], **inputs[1])
        macs = round(counter.get_total_flops() / 2 / instances)
    seen: set[nn.Parameter] = set()
    layers = {}
    for layer, module in network.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        size = LayerSize(
            sum(p.numel() for p in own), None if macs is None else round(operations[module] / 2 / instances)
        )
        if size.params or size.macs:
            layers[join(name, layer)] = size
    return Size(sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters), macs, layers)


@contextlib.contextmanager
def _constant(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradients: forward might keep a part of their graph, and the counter looks for those of passed parameters.

    Nor the kernels and nested tensors that attention of torch uses then, which the counter cannot look into.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in trained:
            parameter.requires_grad_()


@contextlib.contextmanager
def _counting_by_module(network: nn.Module, counter: FlopCounterMode, operations: Counter[nn.Module]) -> Iterator[None]:
    """Count the operations of every module, without those of the modules that it calls."""
    begun: list[int] = []  # of the modules that are running, what was counted before them
    inside = [0]  # and what the modules called by them have done

    def begin(module: nn.Module, args: Any) -> None:
        begun.append(counter.get_total_flops())
        inside.append(0)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        done = counter.get_total_flops() - begun.pop()
        operations[module] += done - inside.pop()
        inside[-1] += done

    with contextlib.ExitStack() as stack:
        for module in network.modules():
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        yield
