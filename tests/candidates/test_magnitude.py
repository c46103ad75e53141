"""The magnitude of units without a scale."""

import pytest
import torch
from scipy.stats import percentileofscore
from torch import nn

from lightning_fscreen.candidates.magnitude import comparable
from lightning_fscreen.candidates.units import Units


def network(activation=nn.ReLU):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 5, 3), activation(), nn.Conv2d(5, 4, 3), activation(), nn.Flatten(), nn.Linear(16, 6)]
    return nn.Sequential(*layers, activation(), nn.Linear(6, 3)).double()


def values_of(net):
    units = Units(net, None, None)
    units.learn(net, (torch.randn(2, 1, 6, 6, dtype=torch.float64),), {})
    return {layer.name: units._values_of(layer) for layer in units._layers}


def test_it_is_the_product_of_the_norms_of_incoming_and_outgoing_weights():
    net = network()
    first, second, third, last = (net[index].weight.detach() for index in (0, 2, 5, 7))
    expected = {
        "0": first.flatten(1).norm(dim=1) * second.transpose(0, 1).flatten(1).norm(dim=1),
        "2": second.flatten(1).norm(dim=1) * third.view(6, 4, 4).transpose(0, 1).flatten(1).norm(dim=1),
        "5": third.norm(dim=1) * last.norm(dim=0),
    }
    found = values_of(net)
    assert found.keys() == expected.keys()
    for name, magnitude in expected.items():
        torch.testing.assert_close(found[name], magnitude)


@pytest.mark.parametrize(("layer", "reader", "repeats"), [(0, 2, 1), (2, 5, 4), (5, 7, 1)])
def test_it_stays_where_relu_lets_the_function_stay(layer, reader, repeats):
    """Incoming weights of every unit times some a > 0, outgoing ones divided by it."""
    net = network()
    before, x = values_of(net)[str(layer)], torch.randn(5, 1, 6, 6, dtype=torch.float64)
    outputs, factors = net(x), torch.randn(len(before), dtype=torch.float64).exp()
    with torch.no_grad():
        rows, columns = net[layer].weight, net[reader].weight
        rows.mul_(factors.view(-1, *[1] * (rows.ndim - 1)))
        net[layer].bias.mul_(factors)
        columns.div_(factors.repeat_interleave(repeats).view(1, -1, *[1] * (columns.ndim - 2)))
    torch.testing.assert_close(net(x), outputs)
    torch.testing.assert_close(values_of(net)[str(layer)], before)


def test_units_that_are_read_several_times_add_up_and_coupled_ones_share_their_readers():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            hidden = (self.a(x) + self.b(x)).relu()
            return self.c(hidden), self.d(hidden)

    net = Sum()
    units = Units(net, None, None)
    units.learn(net, (torch.randn(2, 3),), {})
    outgoing = torch.cat([net.c.weight, net.d.weight]).norm(dim=0)
    for layer in units._layers:
        found = units._values_of(layer)
        torch.testing.assert_close(found, layer.weight.norm(dim=1) * outgoing)
    assert units.names == ["a", "b"]


def test_neurons_are_ranked_in_their_layer_and_channels_among_all_channels():
    torch.manual_seed(0)
    values = {"a": torch.randn(20).abs(), "b": torch.randn(7), "c": torch.randn(9), "d": torch.tensor([3.0, 1.0, 3.0])}
    kept = {name: torch.rand(value.shape) > 0.3 for name, value in values.items()}
    kept["d"][:] = True
    found = comparable(values, kept, {"a": "neuron", "b": "channel", "c": "channel", "d": "neuron"})
    assert found["d"].tolist() == [1, pytest.approx(1 / 3), 1]
    first = percentileofscore(values["a"][kept["a"]], values["a"], "weak") / 100
    both = torch.cat([values[name][kept[name]].abs() for name in "bc"])
    torch.testing.assert_close(found["a"].double(), torch.from_numpy(first), rtol=1e-6, atol=0)
    for name in "bc":
        expected = torch.from_numpy(percentileofscore(both, values[name].abs(), "weak") / 100)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=0)
    assert comparable(values, kept, dict.fromkeys(values, "channel")) == values
    nothing = {"a": torch.zeros(2, dtype=torch.bool)}
    assert comparable({"a": torch.tensor([0.0, 1.0])}, nothing, {"a": "neuron"})["a"].tolist() == [0, 0]


@pytest.mark.parametrize("groups", [1, 2])
def test_units_that_no_weight_multiplies_count_with_their_incoming_weights(groups):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=groups), nn.Flatten(), nn.Linear(4, 2))
    units = Units(net, None, None)
    units.learn(net, (torch.randn(2, 3, 1, 1),), {})
    first = units._layers[0]
    assert bool(first.readers) == (groups == 1)
    if groups == 2:
        torch.testing.assert_close(units._values_of(first), first.weight.flatten(1).norm(dim=1))
