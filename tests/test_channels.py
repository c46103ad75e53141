"""Channels as candidates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_fscreen.channels import find_channels, inverse, refine
from lightning_fscreen.slimming import Gate


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


def network():
    return nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(2, affine=False))


def test_batch_norms_are_found_in_order_with_the_reasons_for_the_others():
    found, reasons = find_channels(network(), exclude="2")
    assert [candidate.name for candidate in found] == ["0", "1"]
    assert reasons == {"2": "left out by exclude=['2']", "3": "it has no scale and shift (affine=False)"}
    with pytest.raises(ValueError, match="matches no layer"):
        find_channels(network(), include="conv*")


def test_channels_coupled_to_what_is_left_out_stay_with_it():
    found, _ = find_channels(network(), exclude="2")
    gates = {
        "0": Gate("0", 3, 0, (7, 8, 9)),
        "1": Gate("1", 4, 1, (10, 11, 12, 13)),
        "2": Gate("2", 4, 1, (10, 11, 20, 21)),
    }
    left, reasons = refine(found, gates, {"0": F.relu})
    assert [candidate.units.tolist() for candidate in left] == [[7, 8, 9], [-1, -1, 12, 13]] and reasons == {}
    assert left[0].activation is F.relu and left[1].activation is None
    gates["2"] = Gate("2", 4, 1, (10, 11, 12, 13))
    gates["0"] = Gate("0", 3, 0, (-1, -1, -1), "a reason")
    _, reasons = refine(found, gates, {})
    assert reasons == {"0": "a reason", "1": "it is coupled to '2', which is not pruned"}
    assert refine(found, {}, {})[1]["0"] == "it is not part of the network that the training step calls"
