"""Inputs that a network is verified on, made of its example inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_SIZES = 4  # that are tried, besides those of the example


def with_noise(example: Any) -> list[Any]:
    """Example inputs, with normal noise, from a generator of its own, in place of the second half of the instances.

    Of a single instance both the example and noise.
    """
    generator = torch.Generator().manual_seed(0)

    def mixed(value: Any) -> Any:
        if not _is_numbers(value):
            return value
        noise, kept = torch.randn(value.shape, generator=generator, device="cpu").to(value), _instances(value) // 2
        return torch.cat([value[:kept], noise[kept:]]) if kept else noise

    alone = all(_instances(leaf) < 2 for leaf in pytree.tree_leaves(example))
    return [*([example] if alone else []), pytree.tree_map(mixed, example)]


def shuffled(example: Any) -> list[Any]:
    """Example inputs, and the same with their numbers shuffled between the instances, at every place by itself.

    For networks that cannot run on noise: forward takes categories or positions from a tensor of numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def mixed(value: Any) -> Any:
        if not _is_numbers(value) or _instances(value) < 2:
            return value
        order = torch.rand(value.shape, generator=generator, device="cpu").argsort(0)
        return value.gather(0, order.to(value.device))

    return [example, pytree.tree_map(mixed, example)]


def smaller(example: Any) -> Iterator[Any]:
    """Example inputs with one element less along all dimensions of one size, but those of the instances."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    for size in sorted({size for tensor in tensors for size in tensor.shape[1:] if size > 1}, reverse=True)[:_SIZES]:

        def cut(tensor: Tensor, size: int = size) -> Tensor:
            if tensor.layout != torch.strided:
                return tensor
            for dim in range(1, tensor.ndim):
                tensor = tensor.narrow(dim, 0, size - 1) if tensor.shape[dim] == size else tensor
            return tensor

        yield pytree.tree_map_only(Tensor, cut, example)


def first_instance(example: Any) -> Any:
    """Example inputs without the other instances: of all tensors that have as many rows as the first one."""
    count = next((len(leaf) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim), 0)

    def first(leaf: Tensor) -> Tensor:
        return leaf[:1] if leaf.ndim and len(leaf) == count and leaf.layout == torch.strided else leaf

    return pytree.tree_map_only(Tensor, first, example)


def _instances(value: Any) -> int:
    return len(value) if isinstance(value, Tensor) and value.ndim else 1


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided
