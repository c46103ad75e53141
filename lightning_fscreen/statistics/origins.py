"""Where features come from: data, or weights that are being trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

_APART = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Where", "Clone", "Alias", "ToCopy", "NativeDropout", "FusedDropout"),
    *("Relu", "LeakyRelu", "Gelu", "Silu", "Elu", "Tanh", "Sigmoid", "Clamp", "ClampMin", "ClampMax", "NanToNum"),
}
"""What autograd calls functions of each element by itself, or of those in the same place."""
_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"}

_Part = tuple[Node | None, torch.Size | None]


def learned_features(activation: Tensor, dimension: int) -> Tensor:
    """In which features of an activation weight matrices that are being trained had a part.

    Inputs of a network are not learned, nor is what fixed functions, frozen layers or the scales and shifts of
    normalisations make of them. Where features are put side by side (`torch.cat`: numbers and embeddings of a table),
    and nothing mixes them on the way, every one has its own answer, else all have the same. Looked up in the graph that
    autograd keeps for the backward pass; without one (under `torch.no_grad`, as in some forms of activation
    checkpointing) the answer is yes.

    Args:
        activation: as it runs, not detached.
        dimension: that of its features.

    Returns:
        (features,) bool, on the CPU.
    """
    if not torch.is_grad_enabled():
        return torch.ones(activation.shape[dimension], dtype=torch.bool)
    return _learned(activation.grad_fn, activation.shape, dimension)


def _learned(node: Node | None, shape: torch.Size, dimension: int) -> Tensor:
    """Of what a node computed, by its shape."""
    everything = torch.ones(shape[dimension], dtype=torch.bool)
    if node is None or not _has_weights(node):
        return ~everything
    name = node.name().rstrip("0123456789").removesuffix("Backward")
    parts = [(before, _shape(before, index)) for before, index in node.next_functions]
    if name == "Cat" and _is_along(node, dimension, len(shape)):
        return _side_by_side(parts, shape, dimension)
    if name not in _APART and not (name in _NORMS and dimension == 1):
        return everything
    if any(own != shape and _has_weights(before) for before, own in parts):  # broadcast
        return everything
    return torch.stack([_learned(before, shape, dimension) for before, _ in parts]).any(0)


def _is_along(node: Node, dimension: int, dimensions: int) -> bool:
    along = getattr(node, "_saved_dim", None)
    return along in (dimension, dimension - dimensions, dimension - dimensions + 2**64)  # negative ones, unsigned


def _side_by_side(parts: Sequence[_Part], shape: torch.Size, dimension: int) -> Tensor:
    """Of tensors that became one; autograd knows the shapes of those with gradients alone."""
    given = [own is None for _, own in parts]
    stretches = sum(now and not before for before, now in zip([False, *given], given, strict=False))
    if stretches > 1 or any(own is None and _has_weights(node) for node, own in parts):
        return torch.ones(shape[dimension], dtype=torch.bool)  # it is not known where each of them begins
    rest = shape[dimension] - sum(own[dimension] for _, own in parts if own is not None)
    found = []
    for node, own in parts:
        found.append(torch.zeros(rest, dtype=torch.bool) if own is None else _learned(node, own, dimension))
        rest = 0 if own is None else rest  # the first of the stretch stands for all
    return torch.cat(found)


def _has_weights(node: Node | None) -> bool:
    """Whether weight matrices that are being trained come before a node."""
    found: set[Node] = set()
    nodes = [node]
    while nodes:
        node = nodes.pop(0)
        if node is None or node in found:
            continue
        found.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and leaf.ndim > 1:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False


def _shape(node: Node | None, index: int) -> torch.Size | None:
    """Of an output of a node; None where autograd does not say."""
    outputs = getattr(node, "_input_metadata", ())  # inputs of the backward pass
    return torch.Size(outputs[index].shape) if index < len(outputs) else None
