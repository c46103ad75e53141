"""Where an activation function takes a value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_fscreen.candidates.inverse import inverse


@given(st.floats(-0.2, 8.0), st.sampled_from([F.silu, F.hardswish, F.gelu, F.leaky_relu, F.elu, F.softplus]))
def test_inverse_is_where_the_activation_takes_the_value(value, activation):
    values = torch.tensor([value], dtype=torch.float64)
    reachable = activation(torch.linspace(-30, 30, 60001, dtype=torch.float64)).min()
    wanted = values.clamp(min=float(reachable) + 1e-3)
    assert activation(inverse(activation, wanted)) == pytest.approx(float(wanted), abs=1e-6)


def test_inverse_takes_the_point_closest_to_zero_and_the_nearest_value_where_there_is_none():
    assert inverse(F.relu, torch.tensor([0.0, 2.5, 40.0])).tolist() == pytest.approx([0.0, 2.5, 40.0], abs=1e-6)
    assert float(inverse(F.relu, torch.tensor([-1.0]))) == pytest.approx(0.0, abs=1e-9)
    assert float(F.relu6(inverse(F.relu6, torch.tensor([7.0])))) == pytest.approx(6.0, abs=1e-6)
    assert len(inverse(F.relu, torch.zeros(0))) == 0
