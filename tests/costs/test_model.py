"""Costs in closed form, against tensors that were really cut."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fscreen.costs.model import CostModel

SHAPES = {"w": (4, 3, 2, 2), "v": (5, 4), "b": (4,), "fixed": (3, 7), "other": (9,)}
FACTORS = {"w": 2.0, "v": 1.0, "b": 0.5, "fixed": 3.0}
DIMS = {
    ("w", 0): torch.tensor([1, 2, 3, 3]),  # the last two live or die as one
    ("w", 1): torch.tensor([0, 4, 5]),
    ("v", 1): torch.tensor([1, 2, 3, 3]),
    ("v", 0): torch.tensor([1, 2, 6, 7, 8]),  # classes in both dimensions
    ("b", 0): torch.tensor([1, 2, 3, 3]),
    ("other", 0): torch.arange(9),
}


def cut_by_hand(kept: Tensor) -> float:
    total = 0.0
    for name, factor in FACTORS.items():
        tensor = torch.zeros(SHAPES[name])
        for dim in range(tensor.ndim):
            if (name, dim) in DIMS:
                tensor = tensor.index_select(dim, kept[DIMS[name, dim]].nonzero().flatten())
        total += factor * tensor.numel()
    return total


def test_costs_are_those_of_the_cut_tensors() -> None:
    model = CostModel(SHAPES, FACTORS, DIMS, 9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        kept = torch.rand(9, generator=generator) < 0.6
        assert model.of(kept) == cut_by_hand(kept)


def test_the_price_of_a_class_is_what_it_adds() -> None:
    """To the first order: a class in both dimensions of a matrix is counted in each, beside what is left."""
    model = CostModel(SHAPES, FACTORS, DIMS, 9)
    kept = torch.tensor([True, True, True, True, True, False, True, True, True])
    prices = model.prices(kept)
    for index in (0, 3, 4, 6, 7, 8):
        without = kept.clone()
        without[index] = False
        assert float(prices[index]) == cut_by_hand(kept) - cut_by_hand(without)
    with_it = kept.clone()
    with_it[5] = True
    assert float(prices[5]) == cut_by_hand(with_it) - cut_by_hand(kept)
    assert float(prices[1]) == 2 * (2 * 4) + 5 + 4 + 0.5  # row of w, column and row of v, b


def test_nothing_changes_where_nothing_can_be_cut() -> None:
    model = CostModel(SHAPES, FACTORS, {}, 3)
    assert model.of(torch.zeros(3, dtype=torch.bool)) == 2 * 48 + 20 + 2 + 63
    assert not bool(model.prices(torch.ones(3, dtype=torch.bool)).any())
