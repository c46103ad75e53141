"""Capture a network as a closed graph of ATen operators, with `torch.export`."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from lightning_fscreen.modules import first_names, in_mode, replaced_forward, same_attributes, uncompiled
from lightning_fscreen.randomness import same_random_numbers
from lightning_fscreen.slimming.escapes import returning_escapes
from lightning_fscreen.slimming.multihead import by_sizes, without_hints
from lightning_fscreen.slimming.transposed import use_linear


class CaptureError(RuntimeError):
    """The network cannot be captured as a graph, so it cannot be slimmed."""


@dataclass(frozen=True)
class Capture:
    """A captured network.

    Attributes:
        graph: training IR of `torch.export`: conv2d, linear, batch_norm, add, cat, …, with shapes in node.meta["val"].
        tensors: placeholder name → name of the parameter or buffer of the network that it stands for; the first, if it
            has several.
        training: whether it is the train mode.
        numbers: placeholder name → number that forward makes a tensor of.
        escapes: of the last outputs of the graph, those that the network itself does not return: why they are some; ""
            where they are none.
        memory: what has been found out about the graph alone, to be asked once.
    """

    graph: fx.Graph
    tensors: dict[str, str]
    training: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)
    escapes: tuple[str, ...] = ()
    memory: dict[str, dict[str, int]] = field(default_factory=dict, compare=False, repr=False)

    def users(self, tensor: str) -> list[fx.Node]:
        """The calls that read a tensor."""
        return [user for node in self.graph.nodes if self.tensors.get(node.name) == tensor for user in node.users]

    def unused(self) -> set[str]:
        """Names of the tensors that nothing reads."""
        nodes = [node for node in self.graph.nodes if node.op == "placeholder" and node.name in self.tensors]
        return {self.tensors[node.name] for node in nodes} - {self.tensors[node.name] for node in nodes if node.users}


def capture(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, training: bool = False
) -> Capture:
    """Capture `network(*args, **kwargs)`; modes are restored.

    Args:
        network: any module.
        args: example inputs.
        kwargs: example keyword inputs.
        training: capture the train mode, where auxiliary heads are seen; eval mode is the default.

    Raises:
        CaptureError: torch.export cannot follow the network's forward; the message quotes its error.
    """
    escapes: list[str] = []
    try:
        with (
            same_attributes(network),  # torch.export puts copies of lists and dicts into their places
            in_mode(network, training),
            plain_norms(network),
            _without_cumulative_averages(network),
            _as_written(network),
            by_sizes(network),
            without_hints(network),
            plain_outputs(network),
            returning_escapes(network, escapes),
            torch.no_grad(),
            same_random_numbers(),
        ):
            program = torch.export.export(network, args, dict(kwargs or {}), strict=False)
    except Exception as error:  # torch.export raises anything that forward, or its own passes, raise
        raise CaptureError(
            f"{type(network).__name__} cannot be captured by torch.export, so nothing can be removed from it "
            f"({_cause(network)}): {error}"
        ) from error
    _inline(program.graph_module, program.graph)
    signature = program.graph_signature
    names = first_names(network)
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    use_linear(program.graph, tensors)
    constants = {
        place: program.constants[name]
        for place, name in signature.inputs_to_lifted_tensor_constants.items()
        if name.startswith("lifted_tensor")  # others are attributes, which may change
    }
    numbers = {place: float(each) for place, each in constants.items() if each.numel() == 1 and not each.is_complex()}
    own = {place: names.get(name, name) for place, name in tensors.items()}
    graph = program.graph
    return Capture(graph, own, training, numbers, _of_inputs(graph, own.keys() | constants.keys(), escapes))


def _of_inputs(graph: fx.Graph, fixed: Collection[str], escapes: Sequence[str]) -> tuple[str, ...]:
    """The escapes, "" instead of those that depend on no input: what a module has computed from its own parameters."""
    depend: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name not in fixed if node.op == "placeholder" else depend.intersection(node.all_input_nodes):
            depend.add(node)
    outputs = pytree.tree_leaves(graph.output_node().args)
    last = outputs[len(outputs) - len(escapes) :]
    return tuple(why if node in depend else "" for why, node in zip(escapes, last, strict=True))


def _cause(network: nn.Module) -> str:
    """Why a network may not be captured."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"module {name!r} is TorchScript; put the module that it was made of in its place"
        if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters(recurse=False)):
            return f"layer {name!r} is not initialised; run a batch through the network first"
    return "usual causes: control flow that depends on values, .item(), unsupported operators"


def _inline(parts: Any, graph: fx.Graph) -> None:
    """What runs under autocast, or with gradients on or off, is a graph of its own: its calls join the others.

    Args:
        parts: the module that holds these graphs.
        graph: changed in place.
    """
    for node in graph.find_nodes(op="get_attr"):
        part: Any = getattr(parts, str(node.target), None)
        for call in list(node.users) if isinstance(part, fx.GraphModule) else ():
            if getattr(call.target, "__name__", "") not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
                continue
            _inline(part, part.graph)
            inputs = call.args[call.args.index(node) + 1 :]
            with graph.inserting_before(call):
                places = dict(zip(part.graph.find_nodes(op="placeholder"), inputs, strict=True))
                results: Any = graph.graph_copy(part.graph, places)
            for item in list(call.users):
                item.replace_all_uses_with(results[item.args[1]])
                graph.erase_node(item)
            graph.erase_node(call)
        if not node.users:
            graph.erase_node(node)


class _PlainNorm(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


@contextlib.contextmanager
def plain_norms(network: nn.Module) -> Iterator[None]:
    """Synchronised batch norms do not communicate inside: other processes are no part of the network."""
    norms = [(module, type(module)) for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
    for module, _ in norms:
        module.__class__ = _PlainNorm  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, own in norms:
            module.__class__ = own


@contextlib.contextmanager
def plain_outputs(network: nn.Module) -> Iterator[None]:
    """Objects that torch does not know are returned as the tensors that they hold.

    Not so what a network returns for itself, to be given back under the same name (the keys and values that a language
    model caches): that is no result, and whoever gives it back has it from the same, smaller network.
    """
    forward = network.forward

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        own_state = {id(value) for value in _given_back(outputs, network)}
        return pytree.tree_map(
            lambda value: [] if id(value) in own_state else _known(value),
            outputs,
            is_leaf=lambda value: id(value) in own_state,
        )

    with replaced_forward(network, plain):
        yield


def _given_back(outputs: Any, network: nn.Module) -> Iterator[Any]:
    """Objects among the outputs that have the name of an argument of some module's forward."""
    if isinstance(outputs, Mapping):
        unknown = {
            str(key): value
            for key, value in outputs.items()
            if _is_unknown(value) and not isinstance(value, Mapping | list | tuple)
        }
        if unknown:
            taken = {name for module in network.modules() for name in inspect.signature(module.forward).parameters}
            yield from (value for key, value in unknown.items() if key in taken)
    elif isinstance(outputs, list | tuple):
        for each in outputs:
            yield from _given_back(each, network)


def _known(value: Any) -> Any:
    return list(_tensors_in(value, set())) if _is_unknown(value) else value


def _is_unknown(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, type) and not type(value).__module__.startswith("torch")


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, type | nn.Module):
        seen.add(id(value))
        inside = value.values() if isinstance(value, dict) else getattr(value, "__dict__", {}).values()
        for item in value if isinstance(value, list | tuple) else inside:
            yield from _tensors_in(item, seen)


@contextlib.contextmanager
def _without_cumulative_averages(network: nn.Module) -> Iterator[None]:
    """Momentum of batch norms that have none, which torch.export cannot follow and the graph does not depend on."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.momentum is None]
    for module in norms:
        module.momentum = 0.1
    try:
        yield
    finally:
        for module in norms:
            module.momentum = None


@contextlib.contextmanager
def _as_written(network: nn.Module) -> Iterator[None]:
    """Compiled parts run as they were written: torch.export of torch 2.6 refuses to follow compiled ones."""
    compiled = []
    for module in network.modules():
        if uncompiled(module) is not module and "forward" in vars(module):  # torch.compile(module)
            compiled.append((module, "forward", module.forward))
            module.forward = uncompiled(module).__call__
        if module._compiled_call_impl is not None:  # noqa: SLF001 (module.compile(), for which torch has no question)
            compiled.append((module, "_compiled_call_impl", module._compiled_call_impl))  # noqa: SLF001
            module._compiled_call_impl = None  # noqa: SLF001
    try:
        yield
    finally:
        for module, name, function in compiled:
            setattr(module, name, function)
