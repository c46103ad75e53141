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
_FARTHEST = 100  # nodes to look at before all features are taken for learned

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
    return _Walk(dimension).learned(activation.grad_fn, activation.shape)


class _Walk:
    """Back from an activation, as long as its features are kept apart."""

    def __init__(self, dimension: int) -> None:
        self._dimension, self._left = dimension, _FARTHEST

    def learned(self, node: Node | None, shape: torch.Size) -> Tensor:
        """Of what a node computed, by its shape."""
        everything = torch.ones(shape[self._dimension], dtype=torch.bool)
        if node is None or not _has_weights(node):
            return ~everything
        self._left -= 1
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        parts = [(before, _shape(before, index)) for before, index in node.next_functions]
        if name == "Cat" and self._is_along(node, len(shape)):
            return self._side_by_side(parts, shape)
        if not (name in _APART or (name in _NORMS and self._dimension == 1)) or self._left < 0:
            return everything
        if any(own != shape and _has_weights(before) for before, own in parts):  # broadcast
            return everything
        return torch.stack([self.learned(before, shape) for before, _ in parts]).any(0)

    def _is_along(self, node: Node, dimensions: int) -> bool:
        negative = self._dimension - dimensions
        return getattr(node, "_saved_dim", None) in (self._dimension, negative, negative + 2**64)  # unsigned

    def _side_by_side(self, parts: Sequence[_Part], shape: torch.Size) -> Tensor:
        """Of tensors that became one; autograd knows the shapes of those with gradients alone."""
        given = [own is None for _, own in parts]
        stretches = sum(now and not before for before, now in zip([False, *given], given, strict=False))
        if stretches > 1 or any(own is None and _has_weights(node) for node, own in parts):
            return torch.ones(shape[self._dimension], dtype=torch.bool)  # it is not known where each of them begins
        rest = shape[self._dimension] - sum(own[self._dimension] for _, own in parts if own is not None)
        found = []
        for node, own in parts:
            found.append(torch.zeros(rest, dtype=torch.bool) if own is None else self.learned(node, own))
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
