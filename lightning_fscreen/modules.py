"""Helpers on modules: names and patterns, modes, the tensors that they hold, why these cannot be pruned, coupling.

This is the one place that reads and writes torch's private dictionaries of tensors: `getattr` would run
parametrizations, `setattr` the modules' own setters.
"""

# ruff: noqa: SLF001

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

Module = TypeVar("Module", bound=nn.Module)


def join(prefix: str, name: str) -> str:
    """Name, in a model, of the tensor or module `name` of its submodule `prefix`; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def is_within(name: str, outer: str) -> bool:
    """Whether a module lies in another one, or is it, by their names."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def select(
    names: Iterable[str],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    kinds: Mapping[str, str] | None = None,
    others: Iterable[str] | None = (),
) -> dict[str, str]:
    """Apply include/exclude glob patterns; returns {name: reason} of the names they leave out.

    Args:
        names: of layers.
        include: patterns; a name must match one. All if None.
        exclude: patterns; a name must match none.
        kinds: name → kind, which patterns may name as "kind=head".
        others: what else a pattern may match; None if anything.

    Raises:
        ValueError: a pattern matches no name.
    """
    names = list(names)
    said = {name: (name, *([f"kind={kinds[name]}"] if kinds else [])) for name in names}
    left_out: dict[str, str] = {}

    def match(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(word, pattern) for word in said[name] for pattern in patterns)

    for argument, patterns in (("include", include), ("exclude", exclude)):
        if patterns is None:
            continue
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in patterns:
            elsewhere = others is None or any(fnmatchcase(other, pattern) for other in others)
            if not elsewhere and not any(match(name, [pattern]) for name in names):
                raise ValueError(f"{argument}={pattern!r} matches no layer; the layers are {names}")
        for name in names:
            if match(name, patterns) != (argument == "include"):
                left_out.setdefault(name, f"left out by {argument}={patterns}")
    return left_out


def batch_size(inputs: Any) -> int:
    """Number of instances in the inputs of a call: the length of the first tensor; 0 without one."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(tensors[0]) if tensors else 0


def is_empty(batch: Any) -> bool:
    """Whether none of the tensors of a batch has an instance."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    return bool(tensors) and not any(map(len, tensors))


def with_instances(inputs: Any, count: int, device: torch.device) -> Any:
    """The inputs of a call for so many instances, repeated as need be, on a device."""
    instances = batch_size(inputs)

    def repeated(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        if tensor.ndim == 0 or len(tensor) != instances:
            return tensor
        return tensor[torch.arange(count, device=device) % instances]

    return pytree.tree_map_only(Tensor, repeated, inputs)


@contextlib.contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside, every submodule's own mode restored afterwards.

    Modules whose `train` does more than to note the mode (adapters that merge into weights for eval mode) are told.
    """
    modes = {module: module.training for module in network.modules()}
    try:
        network.train(training)
        yield
    finally:
        for module, mode in modes.items():
            if type(module).train is not nn.Module.train and module.training != mode:
                module.train(mode)
        for module, mode in modes.items():  # what one is told may go on to its parts
            module.training = mode


OWN_ATTRIBUTES = nn.Module().__dict__.keys()  # what torch keeps there: parameters, submodules, hooks, the mode


@contextlib.contextmanager
def same_attributes(network: nn.Module) -> Iterator[None]:
    """What forward notes in attributes of modules (counters, lists, features) is afterwards what it was before."""
    before = {
        module: {name: (value, _contents(value)) for name, value in vars(module).items() if name not in OWN_ATTRIBUTES}
        for module in network.modules()
    }
    try:
        yield
    finally:
        for module, attributes in before.items():
            own = vars(module)
            for name in own.keys() - attributes.keys() - OWN_ATTRIBUTES:
                del own[name]
            for name, (value, contents) in attributes.items():
                if contents is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(contents)
                if own.get(name, own) is not value:
                    own[name] = value


def _contents(value: Any) -> Any:
    """A copy of a list, dict or set; None of anything else."""
    return value.copy() if type(value) in (list, dict, set) else None


@contextlib.contextmanager
def replaced_forward(network: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, another function is the forward of a module; afterwards it is what it was."""
    own = vars(network).get("forward")
    network.forward = forward
    try:
        yield
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


def evaluating(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Eval mode inside, every submodule's own mode restored afterwards."""
    return in_mode(network, training=False)


def uncompiled(module: Module) -> Module:
    """The module that `torch.compile` has wrapped; any other as it is."""
    inside = module._modules  # an attribute that is no submodule does not count; TorchScript has no dict there
    if "_orig_mod" not in inside:
        return module
    return inside["_orig_mod"]  # type: ignore[return-value]


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is (in, out): GPT-2's `Conv1D`, of transformers."""
    if type(module).__name__ != "Conv1D":
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


def num_inputs(module: nn.Module) -> int:
    """Number of input features or channels of a linear, convolution or batch-norm layer."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, _ConvNd):
        return module.in_channels
    if isinstance(module, _BatchNorm):
        return int(module.num_features)
    if is_transposed_linear(module):
        return module.get_parameter("weight").shape[0]
    raise TypeError(f"no linear, convolution or batch-norm layer: {type(module).__name__}")


def num_outputs(module: nn.Module) -> int:
    """Number of output features or channels of such a layer."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if is_transposed_linear(module):
        return module.get_parameter("weight").shape[1]
    return module.out_channels if isinstance(module, _ConvNd) else num_inputs(module)


def names_of_frozen(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are not trained."""
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def why_fixed(module: nn.Module, owners: Mapping[int, str], noun: str = "weight") -> str | None:
    """Why the parameter `weight` of a layer cannot be pruned; None if it can.

    Args:
        module: a layer with a weight.
        owners: id of a weight → name of the layer that is pruned with it.
        noun: the word for the weight in the reason.
    """
    if is_parametrized(module, "weight"):
        return f"its {noun} is computed by a parametrization"
    weight = module.weight
    if isinstance(weight, UninitializedParameter):
        return f"its {noun} is not initialised; run a batch through the lazy module first"
    if not isinstance(weight, nn.Parameter):
        return f"its {noun} is not a parameter (weight_norm or an older pruning hook replaced it)"
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    if id(weight) in owners:
        return f"shares its {noun} with {owners[id(weight)]!r}, which can be pruned"
    return None


def own_tensors(module: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Weight and bias that a module holds itself: to read a parametrized one can write to its buffers."""
    return module._parameters.get("weight"), module._parameters.get("bias")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a module holds itself."""
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tensor once (shared ones under their first name)."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def first_names(network: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer → the first name of that tensor."""
    first: dict[int, str] = {id(tensor): name for name, tensor in reversed(list(named_tensors(network).items()))}
    parameters, buffers = network.named_parameters, network.named_buffers
    every = [*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)]
    return {name: first[id(tensor)] for name, tensor in every}


def parameters_by_name(model: nn.Module) -> Mapping[str, list[tuple[nn.Module, str]]]:
    """Tensor name (first one, where shared) → every (module, attribute) that holds that tensor."""
    first: dict[int, str] = {id(tensor): name for name, tensor in reversed(list(named_tensors(model).items()))}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                places.setdefault(first[id(tensor)], []).append((module, attribute))
    return places


def places_by_name(model: nn.Module) -> dict[str, list[str]]:
    """Tensor name (first one, where shared) → a name for every module that holds it; one of each that has several."""
    names = {module: name for name, module in model.named_modules()}
    return {
        name: [join(names[module], attribute) for module, attribute in places]
        for name, places in parameters_by_name(model).items()
    }


def put_tensor(module: nn.Module, attribute: str, tensor: Tensor | None) -> None:
    """Replace a parameter or buffer of a module."""
    store = module._parameters if attribute in module._parameters else module._buffers
    store[attribute] = tensor  # type: ignore[assignment]


def coupled_layers(units: Mapping[str, Iterable[int]]) -> list[list[str]]:
    """Connected components of layers that share units.

    Args:
        units: layer → the unit of each of its channels; equal numbers, in one layer or in several, share their fate;
            negative ones belong to none.

    Returns:
        Layers that share units, directly or through others, in lists of their own; in the order of the layers.
    """
    groups: list[tuple[list[str], set[int]]] = []
    for name, labels in units.items():
        own = {int(label) for label in labels if label >= 0}
        names = [name]
        for group in [group for group in groups if group[1] & own]:
            groups.remove(group)
            names, own = [*group[0], *names], own | group[1]
        groups.append((names, own))
    order = {name: place for place, name in enumerate(units)}
    return sorted((sorted(names, key=order.__getitem__) for names, _ in groups), key=lambda names: order[names[0]])
