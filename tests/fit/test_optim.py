"""Optimizers after their parameters have become smaller, against ones that never knew the larger parameters."""

import pytest
import torch
from torch import nn

from lightning_fscreen.fit.optim import Move, check_state, move_parameters

KEPT = torch.tensor([0, 2, 3])
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def step(optimizer, parameter, gradient):
    parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_stays_is_updated_as_if_nothing_had_gone(name):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 4, generator=generator)
    gradients = torch.randn(4, 5, 4, generator=generator)
    large, alone = nn.Parameter(values.clone()), nn.Parameter(values[KEPT].clone())
    other = nn.Parameter(torch.zeros(2))
    optimizer, reference = OPTIMIZERS[name]([large, other]), OPTIMIZERS[name]([alone])
    for gradient in gradients[:2]:
        step(optimizer, large, gradient)
        step(reference, alone, gradient[KEPT])
    small = nn.Parameter(large.detach()[KEPT].clone())
    group = optimizer.param_groups[0]
    bias = nn.Parameter(torch.zeros(3))
    move_parameters([optimizer], [Move(large, small, lambda tensor: tensor[KEPT])], {bias: small})
    assert optimizer.param_groups[0] is group and [id(p) for p in group["params"]] == [id(small), id(other), id(bias)]
    assert torch.equal(small.grad, gradients[1][KEPT]) and large not in optimizer.state
    for gradient in gradients[2:]:
        step(optimizer, small, gradient[KEPT])
        step(reference, alone, gradient[KEPT])
    assert torch.equal(small, alone)


def test_parameters_of_no_optimizer_are_left_out_and_state_of_other_shapes_is_refused():
    frozen, weight = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.Adafactor([weight])
    step(optimizer, weight, torch.ones(4, 4))
    with pytest.raises(
        NotImplementedError, match=r"Adafactor keeps 'row_var' of shape \(4, 1\) for 'fc.weight' .*4, 4"
    ):
        check_state([optimizer], {weight: "fc.weight"})
    check_state([optimizer], {frozen: "other"})
    smaller = nn.Parameter(torch.zeros(2))
    move_parameters([optimizer], [Move(frozen, smaller, lambda tensor: tensor[:2])], {nn.Parameter(smaller): smaller})
    assert len(optimizer.param_groups[0]["params"]) == 1
