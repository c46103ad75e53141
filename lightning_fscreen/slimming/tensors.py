"""The tensors that modules hold: the one place that reads and writes torch's private dictionaries of them."""

# ruff: noqa: SLF001  # getattr would run parametrizations, setattr the modules' own setters

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def own_tensors(module: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Weight and bias that a module holds itself: to read a parametrized one can write to its buffers."""
    return module._parameters.get("weight"), module._parameters.get("bias")


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tensor once (shared ones under their first name)."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def parameters_by_name(model: nn.Module) -> Mapping[str, list[tuple[nn.Module, str]]]:
    """Tensor name (first one, where shared) → every (module, attribute) that holds that tensor."""
    first: dict[int, str] = {id(tensor): name for name, tensor in reversed(list(named_tensors(model).items()))}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                places.setdefault(first[id(tensor)], []).append((module, attribute))
    return places


def put_tensor(module: nn.Module, attribute: str, tensor: Tensor | None) -> None:
    """Replace a parameter or buffer of a module."""
    store = module._parameters if attribute in module._parameters else module._buffers
    store[attribute] = tensor  # type: ignore[assignment]
