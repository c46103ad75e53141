"""Transfer functions, one small one per kind of operator: how slots and constants pass through it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming.capture import Capture, named_tensors
from lightning_fscreen.slimming.slots import Reader, SlotGraph, Value, compress

_POINTWISE = """
    relu relu_ relu6 relu6_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu silu_ mish mish_ sigmoid
    sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ softplus softsign log_sigmoid
    clamp clamp_ clamp_min clamp_max abs neg exp sqrt square pow erf threshold add add_ sub sub_ mul mul_ div div_ rsub
    maximum minimum clone contiguous alias detach detach_ to _to_copy type_as
""".split()
_IDENTITY = "dropout dropout_ feature_dropout feature_dropout_ alpha_dropout feature_alpha_dropout".split()
_MOVES = """
    flatten view reshape _unsafe_view unflatten unsqueeze unsqueeze_ squeeze squeeze_ permute transpose t numpy_T
    movedim swapaxes swapdims expand
""".split()
_WITH_SIZES = {"view", "reshape", "_unsafe_view", "unflatten", "expand"}
_POOLS = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
""".split()


class SlotInterpreter:
    """Walks a captured graph once and fills a `SlotGraph`.

    Args:
        network: the network that was captured; its present weights tell which units are constant.
        captured: its graph.
    """

    def __init__(self, network: nn.Module, captured: Capture) -> None:
        self.slots = SlotGraph()
        self._graph = captured.graph
        tensors = named_tensors(network)
        first_name = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
        lookup = {
            **dict(network.named_parameters(remove_duplicate=False)),
            **dict(network.named_buffers(remove_duplicate=False)),
        }
        self._names = {placeholder: first_name[id(lookup[name])] for placeholder, name in captured.tensors.items()}
        self._tensors = {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}
        self._layers: dict[str, list[tuple[str, str | None]]] = {}  # weight → (layer, its bias) that hold it
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | _ConvNd) and id(module.weight) in first_name:
                bias = None if module.bias is None else first_name[id(module.bias)]
                self._layers.setdefault(first_name[id(module.weight)], []).append((name, bias))
        self._values: dict[fx.Node, Any] = {}
        self._opaque: set[str] = set()  # tensors that some operator uses whole

    @torch.no_grad()
    def run(self) -> SlotGraph:
        """Walk the graph."""
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "output":
                pytree.tree_map_only(fx.Node, self._pin, node.args)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            else:
                self._values[node] = self._unknown(node)
        for (name, _), labels in self.slots.dims.items():
            if name in self._opaque:
                self.slots.pin(labels)
        return self.slots

    def _placeholder(self, node: Any) -> Any:
        value = node.meta.get("val")
        return Value.pinned(tuple(value.shape)) if isinstance(value, Tensor) else value

    def _call(self, node: Any) -> Any:
        if node.target is operator.getitem:
            source = self._values[node.args[0]]
            return source[node.args[1]] if isinstance(source, list | tuple) else self._unknown(node)
        name = node.target.name().removeprefix("aten::").split(".")[0] if hasattr(node.target, "name") else ""
        handler = _HANDLERS.get(name)
        try:
            result = handler(self, node) if handler is not None else None
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return self._unknown(node, f"{type(error).__name__}: {error}")
        if result is None:
            return self._unknown(node)
        if name.endswith("_") and isinstance(node.args[0], fx.Node):
            self._values[node.args[0]] = result  # in place: whoever reads the argument later sees the result
        return result

    def _unknown(self, node: Any, reason: str = "not known to keep channels apart") -> Any:
        """Pin all that an operator reads, and what it puts out."""
        for source in node.all_input_nodes:
            self._pin(source)
        self.slots.pinned[node.name] = f"operator {node.target}: {reason}"
        return pytree.tree_map(
            lambda item: Value.pinned(tuple(item.shape)) if isinstance(item, Tensor) else item, node.meta.get("val")
        )

    def _pin(self, node: fx.Node) -> None:
        if node.name in self._names:
            self._opaque.add(self._names[node.name])
        pytree.tree_map_only(Value, lambda value: self.slots.pin(value.labels), self._values[node])

    def _tensor_name(self, node: Any) -> str | None:
        return self._names.get(node.name) if isinstance(node, fx.Node) else None

    # ---- layers with weights

    def _linear(self, node: Any) -> Value | None:
        return self._weighted(node, channel_dim=-1, padded=False)

    def _conv(self, node: Any) -> Value | None:
        arguments = _arguments(node)
        weight = self._tensor_name(node.args[1])
        if weight is None:
            return None
        rank = self._tensors[weight].ndim
        transposed = "transpose" in str(node.target)
        padding = arguments["padding"]
        padded = transposed or (padding != "valid" if isinstance(padding, str) else any(padding))
        channel_dim = 1 if len(self._value(node.args[0]).shape) == rank else 0
        if arguments["groups"] == 1:
            return self._weighted(node, channel_dim, padded, transposed)
        if not transposed and self._tensors[weight].shape[:2] == (arguments["groups"], 1):
            return self._depthwise(node, weight, channel_dim, padded)
        return None

    def _value(self, node: Any) -> Value:
        """An argument as it comes; a parameter used like this stays whole."""
        value = self._values[node]
        assert isinstance(value, Value)
        if node.name in self._names:
            self._opaque.add(self._names[node.name])
        return value

    def _weighted(self, node: fx.Node, channel_dim: int, padded: bool, transposed: bool = False) -> Value | None:
        """Linear and ungrouped convolution: new slots out, the input's slots read."""
        source, weight_node, bias_node = (*node.args, None)[:3]
        weight, bias = self._tensor_name(weight_node), self._tensor_name(bias_node)
        if weight is None or (bias_node is not None and bias is None):
            return None
        input_dim = 0 if transposed else 1
        tensor = self._tensors[weight].movedim(input_dim, 1).flatten(2) if self._tensors[weight].ndim > 2 else None
        matrix = tensor.sum(2) if tensor is not None else self._tensors[weight]
        nonzero = (tensor != 0).any(2) if tensor is not None else matrix != 0
        labels, constant, known = self.slots.along(self._value(source), channel_dim)
        outputs = self.slots.new(len(matrix))
        self.slots.cut(weight, 1 - input_dim, outputs)
        self.slots.cut(weight, input_dim, labels)
        offset = torch.zeros(len(matrix), dtype=torch.float64)
        if bias is not None:
            self.slots.cut(bias, 0, outputs)
            offset = self._tensors[bias]
        owners = [name for name, own_bias in self._layers.get(weight, []) if own_bias == bias]
        module = owners[0] if len(owners) == 1 else None
        self.slots.readers.append(
            Reader(module, weight, bias, matrix, nonzero, labels, outputs, constant, known, padded, input_dim)
        )
        carried = known & (constant == 0) if padded else known
        out_known = ~(nonzero & ~carried).any(1)
        out_constant = offset + matrix @ torch.where(carried, constant, 0.0)
        return self._by_channel(node, channel_dim, outputs, out_constant, out_known)

    def _depthwise(self, node: fx.Node, weight: str, channel_dim: int, padded: bool) -> Value | None:
        """One kernel per channel: a channel's slot goes through."""
        bias_node = (*node.args, None)[2]
        bias = self._tensor_name(bias_node)
        layers = self._layers.get(weight)
        if not layers or (bias_node is not None and bias is None):
            return None
        labels, constant, known = self.slots.along(self._value(node.args[0]), channel_dim)
        self.slots.cut(weight, 0, labels)
        self.slots.depthwise.update({name: labels for name, _ in layers})
        kernel = self._tensors[weight].flatten(1)
        offset = torch.zeros(len(kernel), dtype=torch.float64)
        if bias is not None:
            self.slots.cut(bias, 0, labels)
            offset = self._tensors[bias]
        carried = known & (constant == 0) if padded else known
        out_known = carried | (kernel == 0).all(1)
        out_constant = offset + kernel.sum(1) * torch.where(carried, constant, 0.0)
        return self._by_channel(node, channel_dim, labels, out_constant, out_known)

    def _batch_norm(self, node: Any) -> Value | None:
        source, *tensors = node.args[:5]
        training, _, eps = node.args[5:8]
        names = [self._tensor_name(tensor) for tensor in tensors]
        if training or any((name is None) != (tensor is None) for name, tensor in zip(names, tensors, strict=True)):
            return None
        labels, constant, known = self.slots.along(self._value(source), 1)
        for name in names:
            if name is not None:
                self.slots.cut(name, 0, labels)
        scale, offset, mean, variance = (self._tensors[name] if name is not None else None for name in names)
        if mean is None or variance is None:
            return self._by_channel(node, 1, labels, torch.zeros_like(constant), torch.zeros_like(known))
        scale = torch.ones_like(mean) if scale is None else scale
        offset = torch.zeros_like(mean) if offset is None else offset
        normalised = torch.where(known, (constant - mean) / (variance + eps).sqrt(), 0.0)
        return self._by_channel(node, 1, labels, normalised * scale + offset, known | (scale == 0))

    def _by_channel(self, node: fx.Node, dim: int, labels: Tensor, constant: Tensor, known: Tensor) -> Value:
        shape = tuple(node.meta["val"].shape)
        view = [1] * len(shape)
        view[dim] = -1
        return Value(shape, labels.reshape(view), constant.reshape(view), known.reshape(view))

    # ---- operators without weights

    def _operands(self, node: Any) -> list[Value] | None:
        """Values of the tensor arguments of a pointwise operator; a parameter gets slots along its only long dim."""
        values = []
        for source in node.all_input_nodes:
            name, value = self._names.get(source.name), self._values[source]
            if name is not None and isinstance(value, Value):
                value = self._parameter(name)
            if not isinstance(value, Value):
                return None
            values.append(value)
        return values

    def _parameter(self, name: str) -> Value:
        tensor = self._tensors[name]
        value = Value(
            tuple(tensor.shape),
            torch.zeros([1] * tensor.ndim, dtype=torch.int64),
            tensor,
            torch.ones([1] * tensor.ndim, dtype=torch.bool),
        )
        long = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if len(long) == 1:
            labels = self.slots.dims.get((name, long[0]))
            labels = self.slots.new(tensor.shape[long[0]]) if labels is None else labels
            self.slots.cut(name, long[0], labels)
            value.labels = labels.reshape([-1 if dim == long[0] else 1 for dim in range(tensor.ndim)])
        else:
            self._opaque.add(name)
        return value

    def _pointwise(self, node: Any) -> Value | None:
        operands = self._operands(node)
        if operands is None or not isinstance(node.meta["val"], Tensor):
            return None
        shape = tuple(node.meta["val"].shape)
        labels = self._unify_operands(operands, shape)
        replaced = dict(zip(node.all_input_nodes, operands, strict=True))
        args, kwargs = pytree.tree_map_only(fx.Node, lambda n: replaced[n].constant.clone(), (node.args, node.kwargs))
        if "dtype" in kwargs or node.target.name().split(".")[0] in ("aten::to", "aten::_to_copy", "aten::type_as"):
            constant = operands[0].constant
        else:
            constant = node.target(*args, **kwargs)
        known = _with_rank(operands[0].known, len(shape))
        for operand in operands[1:]:
            known = known & _with_rank(operand.known, len(shape))
        if node.target.name().startswith("aten::mul"):  # zero times anything
            for operand in operands:
                zero = _with_rank(operand.known & (operand.constant == 0), len(shape))
                known, zero = torch.broadcast_tensors(known, zero)
                constant = torch.where(zero, 0.0, constant)
                known = known | zero
        return Value(shape, labels, _with_rank(constant.double(), len(shape)), known)

    def _unify_operands(self, operands: list[Value], shape: tuple[int, ...]) -> Tensor:
        """Elements that meet share their slot; an operand of size 1 along the others' slots only broadcasts."""
        ranked = [(_with_rank(v.labels, len(shape)), (1,) * (len(shape) - len(v.shape)) + v.shape) for v in operands]
        varying = [dim for dim in range(len(shape)) if any(labels.shape[dim] > 1 for labels, _ in ranked)]
        full = [labels for labels, own in ranked if all(own[dim] == shape[dim] for dim in varying)]
        for labels, own in ranked:
            if any(own[dim] != shape[dim] for dim in varying):
                self.slots.pin(labels)
        if not full:  # an outer product: no operand spans all slots
            return torch.zeros([1] * len(shape), dtype=torch.int64)
        for labels in full[1:]:
            self.slots.unify(full[0], labels)
        return max(full, key=Tensor.numel)

    def _identity(self, node: Any) -> Value:
        return self._value(node.args[0])

    def _move(self, node: Any) -> Value | None:
        """Operators that only rearrange elements are run on the labels themselves."""
        value = self._value(node.args[0])
        moved = [compress(node.target(part.contiguous(), *node.args[1:], **node.kwargs)) for part in value.parts()]
        result = Value(tuple(node.meta["val"].shape), *moved)
        name = node.target.name().removeprefix("aten::").split(".")[0]
        if name.startswith("squeeze"):  # a dimension that shrinks to 1 would go
            dims = node.args[1] if len(node.args) > 1 else range(len(value.shape))
            for dim in dims if isinstance(dims, list | tuple | range) else [dims]:
                if value.labels.shape[dim] > 1:
                    self.slots.pin(value.labels)
        if name in _WITH_SIZES:  # sizes written into forward stay as they are
            sizes = node.args[2] if name == "unflatten" else node.args[1]
            first = node.args[1] % len(value.shape) if name == "unflatten" else 0
            for dim, size in enumerate(sizes, start=first):
                if size != -1 and result.labels.shape[dim] > 1:
                    self.slots.pin(result.labels)
                    self.slots.pinned[node.name] = f"{name} has the size {size} written into forward"
        return result

    def _cat(self, node: Any) -> Value | None:
        values = [self._value(source) for source in node.args[0]]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        parts = zip(*(value.parts() for value in values), strict=True)
        return Value(tuple(node.meta["val"].shape), *(compress(torch.cat(part, dim)) for part in parts))

    def _pool(self, node: Any) -> Value | None:
        """Windows over positions: slots and constants go through, but for zero padding that is averaged in."""
        value = self._value(node.args[0])
        result = node.meta["val"]
        if not isinstance(result, Tensor):
            return None
        labels, constant, known = self.slots.along(value, 1)
        if "avg_pool" in str(node.target) and "adaptive" not in str(node.target):
            arguments = _arguments(node)
            padding = arguments["padding"]
            if any(padding if isinstance(padding, list | tuple) else [padding]) or arguments.get("divisor_override"):
                known = known & (constant == 0)
        return self._by_channel(node, 1, labels, constant, known)

    def _pad(self, node: Any) -> Value | None:
        value = self._value(node.args[0])
        arguments = _arguments(node)
        padded = range(len(value.shape) - len(arguments["pad"]) // 2, len(value.shape))
        if any(value.labels.shape[dim] > 1 for dim in padded):
            return None
        known = value.known
        if arguments.get("mode", "constant") == "constant":
            known = known & (value.constant == (arguments.get("value") or 0.0))
        return Value(tuple(node.meta["val"].shape), value.labels, value.constant, compress(known))

    def _mean(self, node: Any) -> Value | None:
        value = self._value(node.args[0])
        arguments = _arguments(node)
        dims = [dim % len(value.shape) for dim in arguments.get("dim") or range(len(value.shape))]
        parts = [value.labels, *torch.broadcast_tensors(value.constant, value.known)]
        if any(part.shape[dim] > 1 for part in parts for dim in dims):
            return None
        if not arguments.get("keepdim"):
            parts = [part.squeeze(dims) for part in parts]
        return Value(tuple(node.meta["val"].shape), *parts)


def _with_rank(tensor: Tensor, rank: int) -> Tensor:
    return tensor.reshape([1] * (rank - tensor.ndim) + list(tensor.shape))


def _arguments(node: Any) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in."""
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**values, **node.kwargs}


_Handler = Callable[[SlotInterpreter, fx.Node], Any]
_HANDLERS: dict[str, _Handler] = {
    "linear": SlotInterpreter._linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), SlotInterpreter._conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), SlotInterpreter._conv),
    "batch_norm": SlotInterpreter._batch_norm,
    **dict.fromkeys(_POINTWISE, SlotInterpreter._pointwise),
    **dict.fromkeys(_IDENTITY, SlotInterpreter._identity),
    **dict.fromkeys(_MOVES, SlotInterpreter._move),
    **dict.fromkeys(_POOLS, SlotInterpreter._pool),
    "cat": SlotInterpreter._cat,
    "pad": SlotInterpreter._pad,
    "mean": SlotInterpreter._mean,
}
