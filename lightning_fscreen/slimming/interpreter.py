"""One walk over a captured graph: every operator's handler says how slots and constants pass through it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.sym_node import SymTypes
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from lightning_fscreen.modules import is_transposed_linear, named_tensors, own_tensors
from lightning_fscreen.slimming.aliases import Aliases, reshapes
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.seeking import HeadSearch
from lightning_fscreen.slimming.sizes import SIZED, Call
from lightning_fscreen.slimming.slots import Assumption, SlotGraph, Value

Handler = Callable[["Walk", Any], Any]
"""(walk, node) → the `Value` of the operator's output, or a list of them; raises `Unsupported` if it cannot tell."""


class Unsupported(Exception):
    """Slots cannot be followed through this use of an operator: its inputs stay whole, and so does its output.

    Only handlers raise it; what they have unified or pinned until then stays so, which is safe. The message is the
    reason that plans and gates report.
    """

    def __init__(self, reason: str = "not known to keep channels apart") -> None:
        super().__init__(reason)


@dataclass(frozen=True)
class Off:
    """Units of a gate that are switched off.

    Attributes:
        pruned: (units,) bool.
        constant: (units,) float64, their output from then on.
    """

    pruned: Tensor
    constant: Tensor


class Walk:
    """Walks a captured graph once and fills a `SlotGraph`.

    Without `off`, weights that are zero tell which units are constant, and the result holds in eval mode. With it, only
    the channels that are switched off are constant, and the result holds in both modes and for any values of the other
    parameters, so that training can go on.

    Args:
        network: the network that was captured.
        captured: its graph.
        handlers: operator name → transfer function.
        off: gate → its units that are switched off.
        literal: operators (names of nodes: `view` and the like) whose sizes are numbers written into forward, which
            must stay; others' are taken for computed from the input's shape.
        head_dims: what is known of heads, see `HeadSearch`; None where it is to be found out.
    """

    def __init__(
        self,
        network: nn.Module,
        captured: Capture,
        handlers: Mapping[str, Handler],
        off: Mapping[str, Off] | None = None,
        literal: Collection[str] = (),
        head_dims: Mapping[str, int] | None = MappingProxyType({}),
    ) -> None:
        self.slots = SlotGraph()
        self.heads = HeadSearch(head_dims)
        self.modules = dict(network.named_modules())
        self.off = off
        self._literal = literal
        self.values: dict[fx.Node, Any] = {}
        self._aliases = Aliases(self.values)
        self.streams: dict[fx.Node, Tensor] = {}  # selects of ours → the channels of the stream that they select from
        self._graph, self._numbers, self._escapes = captured.graph, captured.numbers, captured.escapes
        self._handlers = handlers
        tensors = named_tensors(network)
        first_name = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
        self.names = captured.tensors
        self._tensors = tensors
        self.layers: dict[str, list[tuple[str, str | None]]] = {}  # weight → (layer, its bias) that hold it
        for name, module in self.modules.items():
            weight, bias = own_tensors(module)
            layer = isinstance(module, nn.Linear | _ConvNd) or is_transposed_linear(module)
            if layer and id(weight) in first_name:
                own_bias = None if bias is None else first_name[id(bias)]
                self.layers.setdefault(first_name[id(weight)], []).append((name, own_bias))
        self.opaque: dict[str, str] = {}  # tensors that some operator uses whole, and why

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
                if (number := self._numbers.get(node.name)) is not None:
                    self.values[node].constant.fill_(number)
                    self.values[node].known.fill_(True)
            elif node.op == "output":
                outputs, escapes = pytree.tree_leaves(node.args), self._escapes
                reasons = ["it is an output of the network"] * (len(outputs) - len(escapes)) + list(escapes)
                for source, reason in zip(outputs, reasons, strict=True):
                    if isinstance(source, fx.Node) and reason:
                        self.pin(source, reason)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            else:
                self.values[node] = self._pinned(node, Unsupported())
        for (name, _), labels in self.slots.dims.items():
            if name in self.opaque:
                self.slots.pin(labels, self.opaque[name])
        calls = {node.name: value for node, value in self.values.items() if node.op == "call_function"}
        self.slots.calls = {name: own.labels.flatten() for name, own in calls.items() if isinstance(own, Value)}
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
        """The value of a tensor argument; a parameter used like this stays whole.

        Raises:
            Unsupported: the argument is no tensor.
        """
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value):
            raise Unsupported("it takes an argument that is no tensor")
        if node.name in self.names:
            if (table := self.table(node)) is not None:
                return table
            self.opaque.setdefault(self.names[node.name], "it is used outside of a layer")
        return value

    def table(self, node: fx.Node) -> Value | None:
        """A parameter or buffer with several dimensions, of which one is that of heads; None for others."""
        name, dim = self.names[node.name], (self.heads.dims or {}).get(node.name)
        if name in self.layers:
            return None
        own = None if dim is None else self.slots.dims.get((name, dim))
        value = self.heads.table(node.name, self.shape(name), self.slots, own)
        if value is not None and dim is not None:
            self.slots.cut(name, dim, value.labels.flatten())
        return value

    def pin(self, node: fx.Node, reason: str) -> None:
        """All slots of a node have to stay."""
        if node.name in self.names:
            self.opaque.setdefault(self.names[node.name], reason)
        pytree.tree_map_only(Value, lambda value: self.slots.pin(value.labels, reason), self.values[node])

    def is_computed(
        self,
        node: fx.Node,
        *values: Value,
        counted: Mapping[int, Tensor | int] | None = None,
        sizes: int = 1,
        dim: int | None = None,
    ) -> bool:
        """Whether the sizes of a call are taken for computed from its input's shape.

        Args:
            node: the call.
            values: what it takes and gives.
            counted: place of a size → slots that it counts, or their number.
            sizes: how many sizes the call is given.
            dim: the dimension that it divides, from the last one.
        """
        if node.name in self._literal:
            return False
        name = operator_name(node).removesuffix("_with_sizes")
        source = values[0]
        call = None
        if counted and name in SIZED:
            call = Call(module_of(node), name, sizes, counted, source.shape, source.varying(), dim)
        line = "\n".join((node.meta.get("stack_trace") or node.name).strip().splitlines()[-2:]).strip()
        self.slots.assumed[node.name] = Assumption(line, module_of(node), values, call)
        return True

    def keep_all(self, node: fx.Node, labels: Tensor, reason: str) -> None:
        """An operator whose sizes count these slots: they have to stay."""
        self.slots.pin(labels, reason)
        self.slots.pinned[node.name] = reason

    def _call(self, node: Any) -> Any:
        try:
            if node.target is operator.getitem:
                return self._item(node)
            handler = self._handlers.get(operator_name(node))
            if handler is None:
                raise Unsupported
            result = handler(self, node)
            if isinstance(node.meta.get("val"), Tensor) and not isinstance(result, Value):
                raise TypeError(f"the handler of {operator_name(node)!r} returned {result!r}, which is no Value")
            if written(node) and not _returns_argument(node):
                raise Unsupported("it writes to an argument that it does not return")
        except Unsupported as unsupported:
            result = self._pinned(node, unsupported)
            if self.heads.dims is None:
                result = self._passed_on(node, result)
        except GuardOnDataDependentSymNode:  # raised by torch where a size is only known when forward runs
            result = self._pinned(node, Unsupported("a size depends on values"))
        for source in written(node):  # whoever reads the argument later sees the result
            shape = tuple(source.meta["val"].shape)
            self._aliases.write(source, result if isinstance(result, Value) else Value.pinned(shape))
        self._aliases.note(node)
        return result

    def _passed_on(self, node: Any, result: Any) -> Any:
        """Where heads are looked for, what is of the shape of the first argument is taken for arranged like it."""
        first = self.values.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if not isinstance(first, Value) or not isinstance(result, Value):
            return result
        known = all(type(size) is int for size in (*first.shape, *result.shape))  # others depend on values
        return first if known and first.shape == result.shape else result

    def _item(self, node: Any) -> Any:
        items, index = node.args
        if not isinstance(self.values[items], list | tuple):
            raise Unsupported
        return self.values[items][index]

    def _pinned(self, node: Any, unsupported: Unsupported) -> Any:
        """Pin the inputs of an operator, and its output."""
        name = operator_name(node) or getattr(node.target, "__name__", str(node.target))
        module = module_of(node)
        reason = f"operation {name!r}{f' in module {module!r}' if module else ''}: {unsupported}"
        for source in node.all_input_nodes:
            self.pin(source, reason)
        self.slots.pinned[node.name] = reason
        return pytree.tree_map(
            lambda item: Value.pinned(tuple(item.shape)) if isinstance(item, Tensor) else item, node.meta.get("val")
        )


def operator_name(node: Any) -> str:
    """`relu_` for the node of `aten.relu_.default`, `mine::gate` for `mine.gate.default`; "" if it is no operator."""
    return node.target.name().removeprefix("aten::").split(".")[0] if hasattr(node.target, "name") else ""


def module_of(node: Any) -> str:
    """Name of the module whose forward makes a call."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return str(modules[-1][0]) if modules else ""


def arguments(node: Any) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in.

    Raises:
        Unsupported: one of them is a number that forward computes from values.
    """
    if any(isinstance(source.meta.get("val"), SymTypes) for source in node.all_input_nodes):
        raise Unsupported("one of its arguments is computed from values")
    schema = _schema(node).arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**values, **node.kwargs}


def written(node: Any) -> list[fx.Node]:
    """The arguments whose elements an operator writes to, as its schema says."""
    if not isinstance(node.target, OpOverload) or reshapes(node):
        return []
    names = [argument.name for argument in _schema(node).arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    targets = [given.get(item.name) for item in _schema(node).arguments if item.is_write]
    return [target for target in pytree.tree_leaves(targets) if isinstance(target, fx.Node)]


def is_view(node: Any) -> bool:
    """Whether an operator returns memory of its argument, and computes nothing."""
    returns = _schema(node).returns if isinstance(node.target, OpOverload) else []
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def _returns_argument(node: Any) -> bool:
    returns = _schema(node).returns
    return len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write


def _schema(node: Any) -> Any:
    return node.target._schema  # noqa: SLF001  # torch has no public way to an operator's schema


def by_channel(node: fx.Node, dim: int, labels: Tensor, constant: Tensor, known: Tensor) -> Value:
    """Value of a node, or of its first output, whose channels run along `dim`."""
    result = node.meta["val"]
    shape = tuple((result[0] if isinstance(result, list | tuple) else result).shape)
    view = [1] * len(shape)
    view[dim] = -1
    return Value(shape, labels.reshape(view), constant.reshape(view), known.reshape(view))
