"""Activation functions that follow batch norms, as the captured network calls them."""

import pytest
import torch
from torch import nn

from lightning_fscreen.candidates.activations import activations_of
from lightning_fscreen.slimming.capture import capture


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.LeakyReLU(0.3, inplace=True),
        nn.ELU(0.7),
        nn.GELU(approximate="tanh"),
        nn.SiLU(inplace=True),
        nn.Hardtanh(-0.5, 2.0),
        nn.Hardswish(inplace=True),
        nn.Softplus(beta=2.0),
        nn.Sigmoid(),
        nn.Threshold(0.2, -1.0),
    ],
    ids=repr,
)
def test_both_forms_are_what_the_network_applies(module):
    network = nn.Sequential(nn.BatchNorm1d(5), module, nn.Linear(5, 2))
    found = activations_of(capture(network, (torch.randn(4, 5),)))
    assert set(found) == {"0"}
    x = torch.randn(4, 5)
    before, expected = x.clone(), module(x.clone())
    assert torch.equal(found["0"](x), expected)
    assert torch.equal(x, before)
    if not isinstance(module, nn.Softplus):  # which torch has not in place
        assert found["0"].in_place(x) is x and torch.equal(x, expected)
    assert torch.equal(found["0"].consume(before), expected)


def test_an_output_that_is_read_twice_has_no_activation():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            x = self.norm(x)
            return torch.relu(x) + x

    assert not activations_of(capture(Twice(), (torch.randn(4, 5),)))
