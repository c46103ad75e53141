"""Slots: the smallest things that live or die as one.

A slot is an equivalence class of (tensor, dimension, index): a hidden unit is row i of one weight, entry i of its bias
and of a batch norm, and column i of the next weight. Slots are found by walking the captured graph once. Every value
carries three small tensors broadcastable to its shape: the slot label of each element, its constant, and whether that
constant is known (it is for the output of a unit whose weights are all zero). Operators that move data are run on the
three as they are; the others have small transfer functions in `operators.py`. An unknown operator pins what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PINNED = 0  # the slot that can never go


@dataclass
class Value:
    """What is known about a tensor in the graph; all fields have its number of dimensions.

    Attributes:
        shape: the tensor's own shape.
        labels: int64, broadcastable to `shape`: slot of each element.
        constant: float64, broadcastable: the element's value, where known.
        known: bool, broadcastable: whether the value is the same for every input and position.
    """

    shape: tuple[int, ...]
    labels: Tensor
    constant: Tensor
    known: Tensor

    @classmethod
    def pinned(cls, shape: tuple[int, ...]) -> Value:
        """A tensor that must stay as it is and of which nothing is known."""
        ones = [1] * len(shape)
        return cls(
            shape,
            torch.full(ones, PINNED, dtype=torch.int64),
            torch.zeros(ones, dtype=torch.float64),
            torch.zeros(ones, dtype=torch.bool),
        )

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, constant and known at full size, to run a data-moving operator on."""
        return self.labels.expand(self.shape), self.constant.expand(self.shape), self.known.expand(self.shape)


def compress(tensor: Tensor) -> Tensor:
    """Narrow every dimension along which nothing changes to size 1."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] > 1:
            first = tensor.narrow(dim, 0, 1)
            if torch.equal(first.expand_as(tensor), tensor):
                tensor = first
    return tensor


@dataclass
class Reader:
    """A linear or ungrouped convolution layer: the place where a slot's value is multiplied by weights.

    Attributes:
        module: name of the layer that can take constants into its bias; None if there is none, or more than one.
        weight, bias: names of the tensors.
        matrix: (out, in) float64, the weight summed over the kernel.
        nonzero: (out, in) bool, whether any weight of the kernel is not zero.
        inputs, outputs: slot labels, (in,) and (out,).
        constant, known: (in,) constants that arrive.
        padded: zero padding meets the input, so that a constant is not the same at the border.
        input_dim: dimension of the weight that runs over inputs.
    """

    module: str | None
    weight: str
    bias: str | None
    matrix: Tensor
    nonzero: Tensor
    inputs: Tensor
    outputs: Tensor
    constant: Tensor
    known: Tensor
    padded: bool
    input_dim: int = 1


@dataclass
class SlotGraph:
    """Everything the walk finds out.

    Attributes:
        readers: in the order of the graph.
        dims: (tensor name, dim) → labels of that dimension, for all that can be cut.
        depthwise: depthwise convolution → slots of its channels.
        pinned: what could not be analysed, operator → reason.
    """

    readers: list[Reader] = field(default_factory=list)
    dims: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    depthwise: dict[str, Tensor] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    _pairs: list[Tensor] = field(default_factory=list)
    _count: int = 1

    def new(self, count: int) -> Tensor:
        """Labels of `count` new slots."""
        labels = torch.arange(self._count, self._count + count)
        self._count += count
        return labels

    def unify(self, first: Tensor, second: Tensor) -> None:
        """Make slots the same, element by element (broadcast)."""
        first, second = torch.broadcast_tensors(first, second)
        self._pairs.append(torch.stack([first.flatten(), second.flatten()]).unique(dim=1))

    def pin(self, labels: Tensor) -> None:
        """Slots that have to stay."""
        self.unify(labels, torch.tensor(PINNED))

    def cut(self, name: str, dim: int, labels: Tensor) -> None:
        """Dimension `dim` of a tensor runs over these slots."""
        if (name, dim) in self.dims:
            self.unify(self.dims[name, dim], labels)
        self.dims[name, dim] = labels

    def along(self, value: Value, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, constants and known along one dimension, (size,), the others reduced.

        Slots that other dimensions run over are pinned.
        """
        size, dim = value.shape[dim], dim % len(value.shape)
        labels = _rows(value.labels, dim)
        if labels.shape[1] > 1:
            self.pin(labels)
        known, constant = torch.broadcast_tensors(value.known, value.constant)
        known, constant = _rows(known, dim), _rows(constant, dim)
        same = known.all(1) & (constant == constant[:, :1]).all(1)
        return labels[:, 0].expand(size), constant[:, 0].expand(size), same.expand(size)

    def components(self) -> Tensor:
        """(number of slots,) the representative of each slot: the smallest label of its class."""
        root = torch.arange(self._count)
        if not self._pairs:
            return root
        first, second = torch.cat(self._pairs, dim=1)
        while True:
            low = torch.minimum(root[first], root[second])
            merged = root.clone()
            for end in (root[first], root[second], first, second):
                merged = merged.scatter_reduce(0, end, low, "amin")
            merged = merged[merged]
            if torch.equal(merged, root):
                return root
            root = merged


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """One row for each index of a dimension, all else flattened behind it."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
