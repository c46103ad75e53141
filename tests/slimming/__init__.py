"""What the tests of slimming share: the masked network itself, in float64, is the oracle."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def outputs(network: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """All output tensors in eval mode and float64; the network itself stays as it is."""
    network = copy.deepcopy(network).double().eval()
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x.clone(), (args, kwargs)
    )
    with torch.no_grad():
        leaves = pytree.tree_leaves(network(*args, **kwargs))
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of each output; inf for other shapes, other integers or NaN."""
    assert len(first) == len(second)
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def snapshot(network: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Identity and a copy of every parameter and buffer, under all their names."""
    named = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in named}


def untouched(network: nn.Module, before: dict[str, tuple[int, Tensor]]) -> bool:
    """Whether all tensors are the same objects with the same bits as in the snapshot."""
    after = snapshot(network)
    return after.keys() == before.keys() and all(
        after[name][0] == identity and torch.equal(after[name][1], tensor)
        for name, (identity, tensor) in before.items()
    )


def zero_rows(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, *units: int) -> None:
    """Take all incoming weights from some units."""
    with torch.no_grad():
        layer.weight[list(units)] = 0


def zero_columns(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, *units: int) -> None:
    """Take all weights that read some units."""
    with torch.no_grad():
        layer.weight[:, list(units)] = 0
