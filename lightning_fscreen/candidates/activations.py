"""The activation functions behind the layers of a captured network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.elementwise import ACTIVATIONS
from lightning_fscreen.slimming.interpreter import operator_name
from lightning_fscreen.statistics.features import Activation

_LAYERS = {"batch_norm", "linear", *(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3))}


def activations_of(captured: Capture) -> dict[str, Activation]:
    """Batch norm, linear or convolution layer → the activation that alone reads its output, where there is one."""
    found = {}
    for node in captured.graph.nodes:
        if node.op != "call_function" or operator_name(node) not in _LAYERS:
            continue
        weight = captured.tensors.get(getattr(node.args[1], "name", ""))
        readers = list(node.users)
        if weight is None or len(readers) != 1 or readers[0].all_input_nodes != [node]:
            continue
        if operator_name(readers[0]) in ACTIVATIONS:
            found[weight.rpartition(".")[0]] = _activation(readers[0])
    return found


def _activation(node: Any) -> Activation:
    """The operator of a node with the node's other arguments, in both forms (`relu` and `relu_`)."""
    name = operator_name(node).removesuffix("_")
    overload = node.target._overloadname  # noqa: SLF001  # torch has no public way to it
    function, in_place = (getattr(getattr(torch.ops.aten, form, None), overload, None) for form in (name, f"{name}_"))
    assert function is not None, name
    bound = {"others": node.args[1:], "keywords": dict(node.kwargs)}
    return Activation(
        partial(_call, function, **bound), None if in_place is None else partial(_call, in_place, **bound)
    )


def _call(
    operator: Callable[..., Tensor], values: Tensor, *, others: tuple[Any, ...], keywords: dict[str, Any]
) -> Tensor:
    return operator(values, *others, **keywords)
