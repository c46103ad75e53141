"""Amounts by patterns."""

from __future__ import annotations

import pytest
import torch

from lightning_fscreen.ranking.amounts import check_patterns, check_range, overall, parts

LAYERS = ["stem", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"]
AMOUNT = {"layer1.*": 0.3, "layer*": 0.6}


def test_the_first_pattern_counts_and_what_none_matches_stays() -> None:
    assert parts(AMOUNT, LAYERS) == {"layer1.*": (0.3, LAYERS[1:3]), "layer*": (0.6, LAYERS[3:])}
    assert parts(0.4, LAYERS) == {"": (0.4, LAYERS)}


def test_overall_is_the_mean_over_candidates() -> None:
    totals = dict(zip(LAYERS, (10, 20, 30, 40), strict=True))
    assert overall(AMOUNT, totals) == pytest.approx((0.3 * 50 + 0.6 * 40) / 100)
    assert overall(0.4, totals) == 0.4


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (1.0, r"amount is .* \[0, 1\), got 1.0"),
        ({"a": 0.5, "b": 1.5}, r"amount\['b'\] .* got 1.5"),
        ({"a": "x"}, r"amount\['a'\] .* got x"),
        ({}, r"a dict of patterns and fractions, got \{\}"),
        (None, "got None"),
    ],
)
def test_ranges(amount: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_range(amount)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"fc": 0.5, "*": 0.2}, r"amount\['fc'\] matches no layer; the layers that can be pruned are \['stem', "),
        ({"*": 0.2, "stem": 0.5}, r"amount\['stem'\] only matches \['stem'\], which patterns before it match; put it"),
        (
            {"layer1.0*": 0.2, "*": 0.5},
            "units of 'layer1.0.bn1' and 'layer1.1.bn1' .* are 0.2 and 0.5; let one pattern",
        ),
        ({"layer1.0*": 0.2, "stem": 0.5}, "amounts are 0.2 and none"),
    ],
)
def test_patterns_that_cannot_be_meant(amount: dict[str, float], message: str) -> None:
    units = dict(zip(LAYERS, torch.tensor([[0, 1, -1], [2, 3, -1], [3, 2, -1], [4, 5, -1]]), strict=True))
    with pytest.raises(ValueError, match=message):
        check_patterns(amount, LAYERS, units)
    check_patterns(AMOUNT, LAYERS, units)
    check_patterns(0.5, LAYERS, units)
