"""Errors without units, against what is left of outputs when the rest is fitted again, and against no order at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_fscreen.candidates.reconstruction import Reading, elimination_errors


def error_without(values: torch.Tensor, weight: torch.Tensor, gone: list[int]) -> float:
    """Share of the squared outputs that the other features cannot give, fitted by least squares."""
    outputs = values @ weight.mT
    stays = [index for index in range(values.shape[1]) if index not in gone]
    fitted = values[:, stays] @ torch.linalg.lstsq(values[:, stays], outputs).solution if stays else 0 * outputs
    return float((outputs - fitted).square().sum() / outputs.square().sum())


def reading(values: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Reading:
    scale = values.square().sum(0).sqrt()
    scaled, weight = values / scale, weight * scale
    return Reading(scaled.mT @ scaled, weight.mT @ weight, labels)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 7), st.integers(0, 3), st.integers(0, 1000))
def test_errors_add_up_to_those_of_the_smaller_layers(copies, count, fixed, seed):
    """Two layers read units of several features, among features that stay."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.randperm(50, generator=generator)[:count]
    parts = []
    for outputs in (3, 5):
        labels = torch.cat([units.repeat(copies), torch.full((fixed,), -1)])
        labels = labels[torch.randperm(len(labels), generator=generator)]
        mixing = torch.randn(len(labels), len(labels), generator=generator, dtype=torch.float64)
        values = torch.randn(60, len(labels), generator=generator, dtype=torch.float64) @ mixing
        weight = torch.randn(outputs, len(labels), generator=generator, dtype=torch.float64)
        parts.append((values, weight, labels))
    errors = elimination_errors(units, [reading(*part) for part in parts])

    def total(gone: list[int]) -> float:
        found = 0.0
        for values, weight, labels in parts:
            columns = torch.isin(labels, units[gone]).nonzero().flatten().tolist()
            found += error_without(values, weight, columns)
        return found

    assume(len(errors.unique()) == count)  # else the order, in which they never decrease, cannot be told
    order = errors.argsort().tolist()
    for place in range(count):  # each is the one that adds least
        gone, rest = order[:place], order[place:]
        added = {unit: total([*gone, unit]) - total(gone) for unit in rest}
        assert added[order[place]] == pytest.approx(min(added.values()), rel=1e-6, abs=1e-9)
    assert float(errors.sum()) == pytest.approx(total(list(range(count))), rel=1e-6)


def test_a_copy_and_what_is_never_read_add_nothing():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 6, generator=generator, dtype=torch.float64)
    values[:, 1] = 3 * values[:, 0]
    values[:, 1] += 1e-6 * torch.randn(100, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    weight[:, 2] = 0
    errors = elimination_errors(torch.arange(6), [reading(values, weight, torch.arange(6))])
    assert sorted(errors.argsort()[:2].tolist()) in ([0, 2], [1, 2])
    assert errors.sort().values[1] < 1e-9 < errors.sort().values[2]


def test_many_units_go_several_at_a_time():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3000, 200, generator=generator, dtype=torch.float64)
    weight = torch.randn(10, 200, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 1, 200)
    errors = elimination_errors(torch.arange(200), [reading(values, weight, torch.arange(200))])
    alone = weight.square().sum(0)  # nearly uncorrelated
    ranks = torch.stack([errors, alone]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    assert errors.sum() == pytest.approx(1, rel=0.1)
