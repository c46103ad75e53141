from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_fscreen.functional import f_statistic, f_statistic_compute, f_statistic_update
from lightning_fscreen.modules import num_inputs
from lightning_fscreen.statistics.connections import ConnectionSums, per_connection
from tests.test_functional import assert_equals_sklearn

C = 3
LAYERS = {
    "linear": lambda: nn.Linear(3, 4),
    "conv": lambda: nn.Conv2d(2, 3, 3),
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise conv": lambda: nn.Conv1d(3, 3, 3, groups=3),
    "transposed conv": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
}

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
ALL_LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
    "linear, one output": (lambda: nn.Linear(4, 1), (2, 4)),
    "linear, one input": (lambda: nn.Linear(1, 3), (2, 1)),
    **{
        f"{kind} {dims}d, {i}→{o}, {groups} groups": (
            lambda layers=layers, dims=dims, i=i, o=o, groups=groups: layers[dims](
                i, o, 3 if dims < 3 else 2, groups=groups
            ),
            (2, i, *[4] * dims),
        )
        for kind, layers in (("conv", CONVS), ("transposed conv", TRANSPOSED))
        for dims in (1, 2, 3)
        for i, o, groups in ((4, 6, 1), (4, 6, 2), (4, 4, 4), (4, 8, 4), (6, 3, 3))
    },
}


@pytest.mark.parametrize(("make", "shape"), ALL_LAYERS.values(), ids=ALL_LAYERS)
def test_a_value_per_input_reaches_exactly_the_weights_that_read_that_input(make, shape):
    """Oracle: with only one input channel non-zero, autograd says which weights matter."""
    module = make()
    inputs = num_inputs(module)
    for index in range(inputs):
        x = torch.zeros(shape)
        x[:, index] = torch.rand(x[:, index].shape) + 0.5
        module.zero_grad()
        module(x).sum().backward()
        spread = per_connection(module, torch.eye(inputs)[index])
        assert torch.equal(spread.expand(module.weight.shape) == 1, module.weight.grad != 0)
        assert torch.equal(spread.expand(module.weight.shape) == 0, module.weight.grad == 0)


@pytest.mark.parametrize(("make", "shape"), ALL_LAYERS.values(), ids=ALL_LAYERS)
def test_leading_dimensions_are_carried_through(make, shape):
    module = make()
    values = torch.rand(2, 3, num_inputs(module))
    spread = per_connection(module, values)
    full = (2, 3, *module.weight.shape)
    assert torch.broadcast_shapes(spread.shape, full) == full
    for i in range(2):
        for j in range(3):
            one = per_connection(module, values[i, j])
            assert torch.equal(spread[i, j].expand(full[2:]), one.expand(full[2:]))


def source(module):
    """The input that every weight reads, by brute force over the groups."""
    index = torch.empty(module.weight.shape, dtype=torch.long)
    for position in np.ndindex(*module.weight.shape):
        row, column = position[:2]
        if isinstance(module, nn.Linear):
            index[position] = column
        elif isinstance(module, nn.ConvTranspose2d):
            index[position] = row
        else:
            group = row // (module.out_channels // module.groups)
            index[position] = group * (module.in_channels // module.groups) + column
    return index


def steps(module, seed, sizes, moving=0.3, mean=2.0):
    """Batches of inputs with the weights they are multiplied with, which move as in training."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(module.weight.shape, generator=rng, dtype=torch.float64)
    for size in sizes:
        labels = torch.randint(C, (size,), generator=rng)
        x = torch.randn(size, num_inputs(module), generator=rng, dtype=torch.float64) + labels.unsqueeze(1) * 0.3 + mean
        yield x, labels, weight
        weight = weight + moving * torch.randn(weight.shape, generator=rng, dtype=torch.float64)


def contributions(module, batches):
    index = source(module).flatten()
    values = torch.cat([x[:, index] * weight.flatten() for x, _, weight in batches])
    return values, torch.cat([labels for _, labels, _ in batches])


def summed(module, batches):
    sums = ConnectionSums(module, C)
    shift = batches[0][0][0]
    for x, labels, weight in batches:
        sums.update(f_statistic_update(x, labels, C, shift), weight)
    return sums


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 20), min_size=2, max_size=6))
def test_f_of_moving_connections_equals_f_classif_of_their_contributions(make, seed, sizes):
    module = make()
    batches = list(steps(module, seed, [*sizes, 12]))
    f = f_statistic_compute(summed(module, batches).class_sums())
    assert f.shape == (module.weight.numel(),)
    assert_equals_sklearn(f, *contributions(module, batches))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_with_weights_that_do_not_move_f_is_that_of_the_inputs(make):
    module = make()
    batches = list(steps(module, 0, [20, 20], moving=0.0))
    f = f_statistic_compute(summed(module, batches).class_sums()).view(module.weight.shape)
    inputs = f_statistic(torch.cat([x for x, _, _ in batches]), torch.cat([labels for _, labels, _ in batches]), C)
    torch.testing.assert_close(f, inputs[source(module)], rtol=1e-9, atol=1e-12)


def test_inputs_far_from_zero_lose_no_digits():
    module = nn.Linear(3, 4)
    batches = list(steps(module, 0, [30, 30], moving=1e-7, mean=1e4))
    values, labels = contributions(module, batches)
    f = f_statistic_compute(summed(module, batches).class_sums())
    torch.testing.assert_close(f, f_statistic(values, labels, C), rtol=1e-6, atol=1e-9)


def test_a_connection_that_is_always_zero_has_f_zero():
    module = nn.Linear(3, 4)
    batches = [(x, labels, weight * torch.eye(4, 3)) for x, labels, weight in steps(module, 0, [20, 20])]
    f = f_statistic_compute(summed(module, batches).class_sums()).view(4, 3)
    assert torch.equal(f == 0, torch.eye(4, 3) == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_low_precision_are_summed_in_float64(dtype):
    module = nn.Linear(3, 4).to(dtype)
    batches = [(x, labels, weight.to(dtype)) for x, labels, weight in steps(module, 0, [20, 20])]
    sums = summed(module, batches)
    assert {part.dtype for part in sums.class_sums()} == {torch.float64}
    exact = [(x, labels, weight.double()) for x, labels, weight in batches]
    assert_equals_sklearn(f_statistic_compute(sums.class_sums()), *contributions(module, exact))


def test_loaded_sums_continue_bit_for_bit():
    module = LAYERS["grouped conv"]()
    batches = list(steps(module, 0, [10, 10, 10]))
    straight = summed(module, batches)
    half = summed(module, batches[:1])
    saved = type(half.class_sums())(*(part.clone() for part in half.class_sums()))
    resumed = ConnectionSums(module, C)
    resumed.load(saved)
    for x, labels, weight in batches[1:]:
        resumed.update(f_statistic_update(x, labels, C, batches[0][0][0]), weight)
    for one, other in zip(straight.class_sums(), resumed.class_sums(), strict=True):
        assert torch.equal(one, other)


def test_reset_forgets_everything():
    module = nn.Linear(3, 4)
    batches = list(steps(module, 0, [20, 20]))
    sums = summed(module, batches)
    sums.reset()
    assert not any(part.any() for part in sums.class_sums())
    for x, labels, weight in steps(module, 1, [20, 20]):
        sums.update(f_statistic_update(x, labels, C), weight)
    again = contributions(module, list(steps(module, 1, [20, 20])))
    assert_equals_sklearn(f_statistic_compute(sums.class_sums()), *again)
