"""Which dimension is that of the heads of an attention, where layers' outputs are taken apart.

`view` and the like do not say it. A first walk over a graph, in which every element has a slot of its own, finds it
out: along it the factors of a product go with each other. The second walk knows it, and makes one slot of each head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_fscreen.slimming.slots import PINNED, SlotGraph, Value

_LARGEST = 2**20  # elements of a tensor that each get a slot of their own
_NOTHING = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Term:
    """An activation that is multiplied by others.

    Attributes:
        value: its slots.
        batch: its dimensions that it has in common with all others and the product, in their order.
        summed: those that are summed over, where that is known.
    """

    value: Value
    batch: Sequence[int]
    summed: Sequence[int] = ()


@dataclass
class HeadSearch:
    """What a walk knows of heads, or finds out.

    Attributes:
        dims: node of an operator that takes channels apart into heads, or of a tensor that holds something for each of
            them → the dimension of the heads. None where it is to be found out: then nothing is cut.
        splits: operator that takes channels apart → labels of its output, while it is to be found out.
        products: likewise, what is multiplied with each other.
        tables: likewise, tensors that may have a dimension of heads → their labels.
    """

    dims: Mapping[str, int] | None
    splits: dict[str, Tensor] = field(default_factory=dict)
    products: list[Sequence[Term]] = field(default_factory=list)
    tables: dict[str, Tensor] = field(default_factory=dict)
    _noted: set[int] = field(default_factory=set)

    def note(self, labels: Tensor) -> None:
        """Each of these slots is a head."""
        self._noted.update(labels.unique().tolist())

    def are(self, labels: Tensor) -> bool:
        """Whether all of these slots are known to be heads."""
        return self._noted.issuperset(labels[labels != PINNED].unique().tolist())

    def tell(self, labels: Tensor) -> bool:
        """Whether slots may tell heads: some are of activations, neither of copies for every head nor of parameters."""
        return not self.are(labels) and not any(bool(inside.all()) for inside in self._in_tables(labels))

    def _are_of_activations(self, labels: Tensor) -> bool:
        return not self.are(labels) and not any(bool(inside.any()) for inside in self._in_tables(labels))

    def _in_tables(self, labels: Tensor) -> Iterator[Tensor]:
        slots = labels[labels != PINNED]
        for own in self.tables.values():  # of consecutive slots
            first, last = own.flatten()[0], own.flatten()[-1]
            yield (slots >= first) & (slots <= last)

    def table(self, node: str, shape: tuple[int, ...], slots: SlotGraph, own: Tensor | None = None) -> Value | None:
        """A tensor that is no activation, and of which a dimension is that of heads; None for others.

        Args:
            node: name of its node.
            shape: of it.
            slots: of the walk.
            own: (heads,) slots that it has already.
        """
        if self.dims is None:
            if sum(size > 1 for size in shape) < 2 or math.prod(shape) > _LARGEST:
                return None
            if node not in self.tables:
                self.tables[node] = slots.new(math.prod(shape)).reshape(shape)
            return replace(Value.pinned(shape), labels=self.tables[node])
        dim = self.dims.get(node)
        if dim is None:
            return None
        labels = slots.new(shape[dim]) if own is None else own
        self.note(labels)
        return replace(
            Value.pinned(shape), labels=labels.reshape([-1 if place == dim else 1 for place in range(len(shape))])
        )

    def found(self, slots: SlotGraph) -> dict[str, int]:
        """The `dims`, after a walk that was to find them out."""
        root = slots.components(pinned=False)
        head_of = torch.full((slots.count,), _NOTHING)
        for terms in self.products:
            for labels, dims in self._numbered(terms):
                sizes = [labels.shape[dim] if dim in dims else 1 for dim in range(labels.ndim)]
                numbers = torch.arange(math.prod(sizes)).reshape(sizes).expand(labels.shape)
                head_of.scatter_reduce_(0, root[labels].flatten(), numbers.flatten(), "amin")
        head_of[PINNED] = _NOTHING
        found = {name: _dim_of(head_of[root[labels]]) for name, labels in (self.splits | self.tables).items()}
        return {name: dim for name, dim in found.items() if dim is not None}

    def _numbered(self, terms: Sequence[Term]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """Labels of the factors of a product, and their dimensions that number the heads.

        These are the dimensions of its batch. Where all heads share keys and values, they are the dimension of the
        queries that is not summed over.
        """
        places = {
            place
            for term in terms
            if self.tell(term.value.labels)
            for place, dim in enumerate(reversed(term.batch), 1)
            if term.value.labels.shape[dim] > 1
        }
        for term in terms:
            labels = term.value.labels
            dims = [term.batch[-place] for place in places if place <= len(term.batch)]
            if not places and self._are_of_activations(labels) and any(labels.shape[dim] > 1 for dim in term.summed):
                dims = [dim for dim in range(labels.ndim) if labels.shape[dim] > 1 and dim not in term.summed]
            if dims:
                yield labels, dims


def _dim_of(heads: Tensor) -> int | None:
    """The only dimension along which the numbers of heads change, as far as they are known.

    It is none of heads if it has several channels of each in a row, and nothing else has changed.
    """
    known = torch.where(heads == _NOTHING, -1, heads)
    varying = [dim for dim in range(heads.ndim) if bool((heads.amin(dim) < known.amax(dim)).any())]
    if len(varying) != 1:
        return None
    (dim,) = varying
    size = heads.shape[dim]
    joined = heads.numel() == size and bool((heads.narrow(dim, 1, size - 1) == heads.narrow(dim, 0, size - 1)).any())
    return None if joined else dim
