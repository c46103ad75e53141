"""Entries of parameters that belong to a candidate."""

import pytest
import torch
from torch import nn

from lightning_fscreen.members import Members


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_sums_and_masks_of_slices_are_those_of_a_loop(dim):
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3 + dim))
    members, values = Members(weight, (bias,), zeroed=True, dim=dim), torch.randn(3, 4, 5)
    slices = [values.select(dim, index) for index in range(3 + dim)]
    assert members.shape == (3 + dim,)
    torch.testing.assert_close(members.total(values), torch.stack([part.sum() for part in slices]))
    torch.testing.assert_close(members.norm(values), torch.stack([part.norm() for part in slices]))
    kept = torch.arange(3 + dim) != 1
    for (parameter, mask), (same, entries) in zip(members.masks(kept), members.affected(~kept), strict=True):
        assert parameter is same and entries.shape == parameter.shape
        assert torch.equal(mask.expand(parameter.shape), ~entries)
    with torch.no_grad():
        weight.mul_(members.spread(kept))
    assert torch.equal(members.nonzero(), kept) and not weight.select(dim, 1).any()


def test_neighbours_that_belong_to_one_candidate():
    torch.manual_seed(0)
    weight, values = nn.Parameter(torch.randn(3, 8)), torch.randn(3, 8)
    members, kept = Members(weight, dim=1, size=2), torch.tensor([True, False, False, True])
    parts = values.split(2, 1)
    assert members.shape == (4,)
    torch.testing.assert_close(members.total(values), torch.stack([part.sum() for part in parts]))
    torch.testing.assert_close(members.norm(values), torch.stack([part.norm() for part in parts]))
    ((_, entries),) = members.affected(~kept)
    assert entries[0].tolist() == [False, False, True, True, True, True, False, False]
    left = members.cut(kept, lambda columns, dims: columns[[0, 1, 4, 5, 6, 7]] if dims == (1,) else columns)
    assert left.tolist() == [True, False, True]


def test_without_a_dimension_every_entry_is_a_candidate():
    weight = nn.Parameter(torch.tensor([[1.0, 0.0], [-2.0, 3.0]]))
    members = Members(weight)
    assert members.shape == (2, 2)
    assert members.nonzero().tolist() == [[True, False], [True, True]]
    assert members.norm(weight.detach()).tolist() == [[1, 0], [2, 3]]
    ((masked, _),) = members.masks(torch.ones(2, 2, dtype=torch.bool))
    assert masked is weight
    assert members.of(nn.Parameter(torch.ones(1, 2))).shape == (1, 2)
