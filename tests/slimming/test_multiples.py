"""Blocks of classes against a count of every width, and what slimming keeps for them."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fscreen.slimming.multiples import find_multiples

WIDTHS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), max_size=4)


@given(WIDTHS, st.integers(1, 8), st.sets(st.integers(0, 9)))
def test_filled_blocks_make_every_width_a_multiple_or_hold_whole_ones(widths, round_to, chosen):
    labels = [torch.tensor(width) for width in widths]
    found = find_multiples(labels, 10, round_to)
    kept = torch.tensor([label in chosen for label in range(10)])
    filled = found.filled(kept)
    assert not bool((kept & ~filled).any())
    profiles = [tuple(width.count(label) for width in widths) for label in range(10)]
    for label, profile in enumerate(profiles):
        block = [other for other in range(10) if profiles[other] == profile]
        assert [other for other in range(10) if found.blocks[other] == found.blocks[label]] == block
        step = math.lcm(*(round_to // math.gcd(round_to, times) for times in profile))
        assert int(found.steps[found.blocks[label]]) == step
        left, before = int(filled[block].sum()), int(kept[block].sum())
        assert left == min(-(-before // step) * step, len(block))
