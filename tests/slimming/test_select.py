"""A batch norm that selects its channels from a wider stream."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_fscreen.slimming.select import SELECT, put_select, selected

CPU = torch.device("cpu")
INPUTS = {nn.BatchNorm1d: (4, 6), nn.BatchNorm2d: (4, 6, 3, 3), nn.BatchNorm3d: (4, 6, 2, 2, 2)}


@pytest.mark.parametrize(("kind", "shape"), [*INPUTS.items(), (nn.BatchNorm1d, (4, 6, 5))])
@pytest.mark.parametrize("training", [True, False])
def test_the_selected_channels_are_normalised(kind: Any, shape: tuple[int, ...], training: bool) -> None:
    norm = kind(3).train(training)
    plain = copy.deepcopy(norm)
    put_select(norm, (0, 2, 5), CPU)
    x = torch.randn(shape)
    assert torch.equal(norm(x), plain(x[:, [0, 2, 5]]))
    assert torch.equal(norm(input=x), plain(x[:, [0, 2, 5]]))
    assert torch.equal(norm.running_mean, plain.running_mean)


@given(st.sets(st.integers(0, 8), min_size=1).map(lambda found: tuple(sorted(found))))
def test_gradients_reach_the_selected_channels_alone(indices: tuple[int, ...]) -> None:
    norm = nn.BatchNorm1d(len(indices)).double().eval()
    put_select(norm, indices, CPU)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum(0).nonzero().flatten().tolist() == list(indices)


def test_the_indices_are_a_buffer_that_is_not_saved() -> None:
    norm = nn.BatchNorm2d(2)
    names = list(norm.state_dict())
    assert selected(norm) is None
    put_select(norm, (1, 4), CPU)
    index = selected(norm)
    assert index is not None and index.tolist() == [1, 4] and index.dtype == torch.int64
    assert list(norm.state_dict()) == names and SELECT in dict(norm.named_buffers())
    assert selected(norm.half()) is index  # no dtype but its own
    assert norm.to("meta").get_buffer(SELECT).device.type == "meta"


def test_another_select_replaces_the_first() -> None:
    norm = nn.BatchNorm1d(2).eval()
    put_select(norm, (1, 4), CPU)
    put_select(norm, (0, 2), CPU)
    x = torch.randn(3, 5)
    assert len(norm._forward_pre_hooks) == 1
    assert torch.equal(norm(x), nn.BatchNorm1d(2).eval()(x[:, [0, 2]]))


def test_undo_puts_back_what_was() -> None:
    norm, x = nn.BatchNorm1d(2).eval(), torch.randn(3, 5)
    calls: list[int] = []
    norm.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    first = put_select(norm, (1, 4), CPU)
    index, expected = selected(norm), norm(x)
    put_select(norm, (0, 2), CPU)()
    assert selected(norm) is index and torch.equal(norm(x), expected)
    first()
    assert selected(norm) is None and not dict(norm.named_buffers()).keys() & {SELECT}
    assert norm(x[:, :2]).shape == (3, 2) and calls == [5, 5, 2]


def test_the_users_hooks_see_the_whole_stream_before_and_their_own_channels_after() -> None:
    norm = nn.BatchNorm1d(2)
    seen: list[int] = []
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    put_select(norm, (1, 4), CPU)
    norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    norm(torch.randn(3, 5))
    assert seen == [5, 2]


def test_it_follows_copies_pickles_and_exports() -> None:
    norm, x = nn.BatchNorm1d(2).eval(), torch.randn(3, 5)
    put_select(norm, (1, 4), CPU)
    expected = norm(x)
    twin = copy.deepcopy(norm)
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    program = torch.export.export(norm, (x,), strict=False).module()  # torch 2.6 does not, by default
    for other in (twin, torch.load(file, weights_only=False), program):
        assert torch.equal(other(x), expected)
    norm.get_buffer(SELECT).fill_(0)
    assert torch.equal(twin(x), expected)  # the copy has its own
