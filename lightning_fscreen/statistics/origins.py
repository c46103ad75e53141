"""Where features come from: data, or weights that are being trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_learned(activation: Tensor) -> bool:
    """Whether weight matrices that are being trained had a part in an activation.

    Inputs of a network are not learned, nor is what fixed functions, frozen layers or the scales and shifts of
    normalisations make of them. Looked up in the graph that autograd keeps for the backward pass; without one (under
    `torch.no_grad`, as in some forms of activation checkpointing) the answer is yes.
    """
    if not torch.is_grad_enabled():
        return True
    found = set()
    nodes = [activation.grad_fn]
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
