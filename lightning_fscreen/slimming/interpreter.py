"""One walk over a captured graph: every operator's transfer function, and what it finds out about slots."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming.capture import Capture, named_tensors, own_tensors
from lightning_fscreen.slimming.slots import SlotGraph, Value

Handler = Callable[["Walk", Any], Any]


@dataclass(frozen=True)
class Off:
    """Channels of a batch norm that are switched off.

    Attributes:
        pruned: (channels,) bool.
        constant: (channels,) float64, what they put out from then on.
    """

    pruned: Tensor
    constant: Tensor


class Walk:
    """Walks a captured graph once and fills a `SlotGraph`.

    Without `off`, weights that are zero tell which units are constant, and the walk says what holds in eval mode. With
    it, only the channels that are switched off are constant: what the walk says holds in both modes and whatever the
    other parameters are, so that training can go on.

    Args:
        network: the network that was captured.
        captured: its graph.
        handlers: operator name → transfer function.
        off: batch norm → its channels that are switched off.
        literal: take sizes in `view` and the like for numbers written into forward, which must stay; otherwise for
            computed from the input's shape.
    """

    def __init__(
        self,
        network: nn.Module,
        captured: Capture,
        handlers: Mapping[str, Handler],
        off: Mapping[str, Off] | None = None,
        literal: bool = False,
    ) -> None:
        self.slots = SlotGraph()
        self.modules = dict(network.named_modules())
        self.off = off
        self.literal = literal
        self.values: dict[fx.Node, Any] = {}
        self.streams: dict[fx.Node, Tensor] = {}  # what a node selects channels from
        self._graph = captured.graph
        self._handlers = handlers
        tensors = named_tensors(network)
        first_name = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
        lookup = {
            **dict(network.named_parameters(remove_duplicate=False)),
            **dict(network.named_buffers(remove_duplicate=False)),
        }
        self.names = {placeholder: first_name[id(lookup[name])] for placeholder, name in captured.tensors.items()}
        self._tensors = tensors
        self.layers: dict[str, list[tuple[str, str | None]]] = {}  # weight → (layer, its bias) that hold it
        for name, module in self.modules.items():
            weight, bias = own_tensors(module)
            if isinstance(module, nn.Linear | _ConvNd) and id(weight) in first_name:
                own_bias = None if bias is None else first_name[id(bias)]
                self.layers.setdefault(first_name[id(weight)], []).append((name, own_bias))
        self.opaque: dict[str, str] = {}  # tensors that some operator uses whole, and which

    @property
    def training(self) -> bool:
        """Whether parameters may change afterwards."""
        return self.off is not None

    @torch.no_grad()
    def run(self) -> SlotGraph:
        """Walk the graph."""
        for node in self._graph.nodes:
            if node.op == "placeholder":
                value = node.meta.get("val")
                self.values[node] = Value.pinned(tuple(value.shape)) if isinstance(value, Tensor) else value
            elif node.op == "output":
                pytree.tree_map_only(fx.Node, lambda source: self.pin(source, "the network puts it out"), node.args)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            else:
                self.values[node] = self._unknown(node)
        for (name, _), labels in self.slots.dims.items():
            if name in self.opaque:
                self.slots.pin(labels, self.opaque[name])
        return self.slots

    def tensor(self, name: str) -> Tensor:
        """A parameter's or buffer's present value, on the CPU in float64."""
        return self._tensors[name].detach().cpu().double()

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's or buffer's shape."""
        return tuple(self._tensors[name].shape)

    def name(self, node: Any) -> str | None:
        """Name of the parameter or buffer that a node stands for."""
        return self.names.get(node.name) if isinstance(node, fx.Node) else None

    def value(self, node: Any) -> Value:
        """An argument as it comes; a parameter used like this stays whole."""
        value = self.values[node]
        assert isinstance(value, Value)
        if node.name in self.names:
            self.opaque.setdefault(self.names[node.name], "it is used outside of a layer")
        return value

    def pin(self, node: fx.Node, reason: str) -> None:
        """All slots of a node have to stay."""
        if node.name in self.names:
            self.opaque.setdefault(self.names[node.name], reason)
        pytree.tree_map_only(Value, lambda value: self.slots.pin(value.labels, reason), self.values[node])

    def _call(self, node: Any) -> Any:
        if node.target is operator.getitem:
            source = self.values[node.args[0]]
            return source[node.args[1]] if isinstance(source, list | tuple) else self._unknown(node)
        name = operator_name(node)
        handler = self._handlers.get(name)
        try:
            result = handler(self, node) if handler is not None else None
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return self._unknown(node, f"{type(error).__name__}: {error}")
        if result is None:
            return self._unknown(node)
        if name.endswith("_") and isinstance(node.args[0], fx.Node):
            self.values[node.args[0]] = result  # in place: whoever reads the argument later sees the result
        return result

    def _unknown(self, node: Any, reason: str = "not known to keep channels apart") -> Any:
        """Pin all that an operator reads, and what it puts out."""
        message = f"operator {node.target}: {reason}"
        for source in node.all_input_nodes:
            self.pin(source, message)
        self.slots.pinned[node.name] = message
        return pytree.tree_map(
            lambda item: Value.pinned(tuple(item.shape)) if isinstance(item, Tensor) else item, node.meta.get("val")
        )


def operator_name(node: Any) -> str:
    """`relu_` of the node of `aten.relu_.default`; empty for what is no operator."""
    return node.target.name().removeprefix("aten::").split(".")[0] if hasattr(node.target, "name") else ""


def arguments(node: Any) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in."""
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**values, **node.kwargs}


def by_channel(node: fx.Node, dim: int, labels: Tensor, constant: Tensor, known: Tensor) -> Value:
    """Value of a node, or of the first item that it puts out, whose channels run along `dim`."""
    result = node.meta["val"]
    shape = tuple((result[0] if isinstance(result, list | tuple) else result).shape)
    view = [1] * len(shape)
    view[dim] = -1
    return Value(shape, labels.reshape(view), constant.reshape(view), known.reshape(view))
