"""Slots: the smallest things that live or die as one.

A slot is an equivalence class of (tensor, dimension, index): a hidden unit is row i of one weight, entry i of its bias
and of a batch norm, and column i of the next weight. Slots are found by walking the captured graph once. Every value
carries three small tensors broadcastable to its shape: the slot label of each element, its constant, and whether that
constant is known (it is for the output of a unit whose weights are all zero). Operators that move data are run on the
three as they are; the others have small handlers (see `operators.py`). An unknown operator pins its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_fscreen.slimming.readers import Reader
from lightning_fscreen.slimming.sizes import Call

PINNED = 0  # the slot that can never go


@dataclass
class Value:
    """Slots and constants of a tensor in the graph; all fields have its number of dimensions.

    Attributes:
        shape: the tensor's own shape.
        labels: int64, broadcastable to `shape`: slot of each element.
        constant: float64, broadcastable: the element's value, where known.
        known: bool, broadcastable: whether the value is the same for every input and position.
        rows: where it is some rows of a matrix: the name of the parameter, and which they are.
    """

    shape: tuple[int, ...]
    labels: Tensor
    constant: Tensor
    known: Tensor
    rows: tuple[str, slice] | None = field(default=None, kw_only=True)

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

    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, constant and known as they are stored."""
        return self.labels, self.constant, self.known

    def along(self, dim: int) -> Tensor:
        """(size,) labels along one dimension, where the others begin."""
        rows = _rows(self.labels, dim)[:, 0]
        return rows.expand(self.shape[dim])

    def varying(self) -> dict[int, Tensor]:
        """Dimension, from the last one → labels along it, where they vary."""
        dims = [dim for dim, size in enumerate(self.labels.shape) if size > 1]
        return {dim - len(self.shape): self.along(dim) for dim in dims}

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, constant and known at full size, to run a data-moving operator on."""
        return self.labels.expand(self.shape), self.constant.expand(self.shape), self.known.expand(self.shape)


def compress(tensor: Tensor) -> Tensor:
    """Narrow every dimension along which nothing changes to size 1."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] > 1:
            first = tensor.narrow(dim, 0, 1)
            if tensor.stride(dim) == 0 or torch.equal(first.expand_as(tensor), tensor):
                tensor = first
    return tensor


@dataclass(frozen=True)
class Stream:
    """The input of a batch norm.

    Attributes:
        labels: slots of all channels of the stream.
        indices: the channels that the batch norm selects, one for each of its own.
    """

    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Assumption:
    """A call whose sizes were taken for computed from its input's shape, not written as numbers.

    Attributes:
        line: where it stands in the source.
        module: the module whose forward it is in.
        values: what it takes and gives.
        call: the call itself, with the sizes that count slots; None where other numbers do.
    """

    line: str
    module: str
    values: tuple[Value, ...]
    call: Call | None = None


@dataclass(frozen=True)
class Heads:
    """The heads of an attention, or other units that are switched off by the columns of the layer that reads them.

    Attributes:
        projection: name of that layer; its inputs are the heads, one after the other, divided evenly.
        labels: (heads,) their slots.
        kind: of the gate.
    """

    projection: str
    labels: Tensor
    kind: str = "head"


@dataclass(frozen=True)
class Average:
    """A mean over channels, of which those can go that are always zero.

    With D of them before and n left it is D/n times as large. So must be the eps that is added to it, and a gain takes
    the rest.

    Attributes:
        labels: (D,), slots of the channels.
        module: the module that averages.
        eps: its attribute that is added to the mean; None stands for the rounding step of the dtype.
        gain: name of a parameter that all that depends on the mean is multiplied by.
        power: of D/n that the gain is multiplied by.
        size: attribute that holds (D,), if there is one.
    """

    labels: Tensor
    module: str
    eps: str
    gain: str
    power: float
    size: str | None = None


@dataclass
class SlotGraph:
    """Everything the walk finds out.

    Attributes:
        readers: in the order of the graph.
        dims: (tensor name, dim) → labels of that dimension, for all that can be cut.
        weights: those of these tensors that linear and convolution layers multiply by.
        depthwise: depthwise convolution → slots of its channels.
        gates: batch norm, or another layer that is switched off → slots of its outputs.
        layers: linear or convolution layer → slots of its outputs.
        counts: module → {attribute that counts channels: (slots of the channels, how many are counted as one)}.
        averages: means over channels that may lose some.
        streams: batch norm → its input, where it is free to select channels of it.
        pinned: operators that could not be followed → reason.
        pins: slots that have to stay, and why.
        assumed: operators whose sizes were taken for computed.
        mixed: slots of values in which an activation without channels of its own has a part.
        trained: slots whose constant is a parameter, so that training changes it.
        products: call that multiplies activations, or weight that all heads share → the slots of its result, flattened.
        attended: modules that combine heads, the slots of these, in their order, and how many readers come before.
        heads: name of a gate → the heads that it switches off.
        calls: call → the slots of its result, flattened, where it has one.
    """

    readers: list[Reader] = field(default_factory=list)
    dims: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    depthwise: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, dict[str, tuple[Tensor, int]]] = field(default_factory=dict)
    averages: list[Average] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    assumed: dict[str, Assumption] = field(default_factory=dict)
    mixed: list[Tensor] = field(default_factory=list)
    trained: list[Tensor] = field(default_factory=list)
    products: dict[str, Tensor] = field(default_factory=dict)
    attended: list[tuple[str, Tensor, int]] = field(default_factory=list)
    heads: dict[str, Heads] = field(default_factory=dict)
    calls: dict[str, Tensor] = field(default_factory=dict)
    _pairs: list[Tensor] = field(default_factory=list)
    _count: int = 1

    @property
    def count(self) -> int:
        """Number of slots so far."""
        return self._count

    def new(self, count: int) -> Tensor:
        """Labels of `count` new slots."""
        labels = torch.arange(self._count, self._count + count)
        self._count += count
        return labels

    def unify(self, first: Tensor, second: Tensor) -> None:
        """Make slots the same, element by element (broadcast)."""
        first, second = torch.broadcast_tensors(first, second)
        pairs = torch.stack([first.flatten(), second.flatten()])
        stays = (pairs == PINNED).any(0)
        self.pin(pairs[:, stays], "it is added to, or multiplied by, a tensor whose channels all stay")
        numbers = (pairs[0] * self._count + pairs[1])[~stays].unique()  # of single numbers: faster than of columns
        self._pairs.append(torch.stack([numbers // self._count, numbers % self._count]))

    def pin(self, labels: Tensor, reason: str) -> None:
        """Slots that have to stay."""
        labels = labels[labels != PINNED].unique()
        if len(labels):
            self.pins.append((labels, reason))

    def cut(self, name: str, dim: int, labels: Tensor) -> None:
        """Dimension `dim` of a tensor runs over these slots."""
        if (name, dim) in self.dims:
            self.unify(self.dims[name, dim], labels)
        self.dims[name, dim] = labels

    def multiply(self, name: str, rows: Tensor, columns: Tensor | None = None) -> None:
        """A layer multiplies by this weight, whose first two dimensions run over these slots."""
        self.weights.add(name)
        self.cut(name, 0, rows)
        if columns is not None:
            self.cut(name, 1, columns)

    @property
    def widths(self) -> dict[tuple[str, int], Tensor]:
        """Those of `dims` that are widths of a linear or convolution layer."""
        return {place: labels for place, labels in self.dims.items() if place[0] in self.weights}

    def along(self, value: Value, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, constants and known along one dimension, (size,), the others reduced.

        Slots that other dimensions run over are pinned.
        """
        size, dim = value.shape[dim], dim % len(value.shape)
        labels = _rows(value.labels, dim)
        if labels.shape[1] > 1:
            self.pin(labels, "its channels are spread over several dimensions")
        known, constant = torch.broadcast_tensors(value.known, value.constant)
        known, constant = _rows(known, dim), _rows(constant, dim)
        same = known.all(1) & (constant == constant[:, :1]).all(1)
        return labels[:, 0].expand(size), constant[:, 0].expand(size), same.expand(size)

    def components(self, pinned: bool = True) -> Tensor:
        """(number of slots,) the representative of each slot: the smallest label of its class.

        Args:
            pinned: whether slots that have to stay are in the class of `PINNED`.
        """
        root = torch.arange(self._count)
        pairs = list(self._pairs)
        if pinned:
            pairs += [torch.stack([labels, torch.full_like(labels, PINNED)]) for labels, _ in self.pins]
        if not pairs:
            return root
        first, second = torch.cat(pairs, dim=1)
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
