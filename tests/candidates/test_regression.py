"""What stays does the work of what goes: against scikit-learn, and on networks of which the answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.linear_model import Ridge
from torch import nn

from lightning_fscreen import prune
from lightning_fscreen.candidates.regression import ridge
from tests.conftest import digits, loader
from tests.slimming.test_units import NETWORKS, build


def correlated(instances: int, features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    return torch.randn(instances, features, generator=generator) @ mixing * torch.logspace(-3, 3, features)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 400), st.integers(2, 60), st.integers(0, 1000), st.data())
def test_coefficients_are_those_of_a_ridge_regression(instances, features, seed, data):
    values = correlated(instances, features, seed).double()
    pruned = torch.tensor(data.draw(st.lists(st.booleans(), min_size=features, max_size=features)))
    pruned[0], pruned[-1] = True, False
    found = ridge(values.mT @ values, pruned, instances)

    def shrinkage(values):
        scaled = values / values.square().sum(0).sqrt()
        squares = float((scaled.mT @ scaled).square().sum())
        above, below = (1 - 2 / features) * squares + features**2, (instances + 1 - 2 / features) * (squares - features)
        return min(above / below, 1.0) if below > 0 else 1.0  # nothing is correlated

    _, known = oas(
        (values / values.square().mean(0).sqrt()).numpy(), assume_centered=True
    )  # without terms 2 / features
    assert shrinkage(values) == pytest.approx(known, rel=4 / features + 4 / instances)
    one_more = torch.eye(features, dtype=torch.float64) * values.square().sum(0).mean().div(instances).sqrt()
    values = torch.cat([values, one_more])
    scale = (values.square().sum(0) / instances).sqrt()
    scaled, shrinkage = values / scale, shrinkage(values)
    strength = instances * shrinkage / max(1 - shrinkage, 1e-12)
    expected = Ridge(alpha=strength, fit_intercept=False).fit(scaled[:, ~pruned], scaled[:, pruned]).coef_
    found = found * scale[~pruned] / scale[pruned][:, None]
    torch.testing.assert_close(found, torch.from_numpy(expected).view_as(found), rtol=1e-4, atol=1e-7)


def test_features_that_are_never_active_have_no_part():
    values = torch.randn(50, 4)
    values[:, 1], values[:, 2] = 0, 0
    found = ridge(values.mT @ values, torch.tensor([False, True, False, True]), 50)
    assert found.isfinite().all()
    assert (found[0] == 0).all()
    assert (found[:, 1] == 0).all()


class Twins(nn.Module):
    """Every unit comes twice, and the second of each pair counts for little."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.next = nn.Linear(8 * 64, 12) if flat else nn.Conv2d(8, 12, 3, padding=1)
        self.last = nn.Linear(12, 10)
        with torch.no_grad():
            for layer, reader in ((self.conv, self.next), (self.next, self.last)):
                half = len(layer.weight) // 2
                layer.weight[half:], layer.bias[half:] = layer.weight[:half], layer.bias[:half]
                reader.weight[:, reader.weight.shape[1] // 2 :] *= 0.5

    def forward(self, images):
        x = self.conv(images).relu()
        x = self.next(x.flatten(1)) if isinstance(self.next, nn.Linear) else self.next(x).relu().mean((2, 3))
        return self.last(nn.functional.gelu(x))


@pytest.mark.parametrize("flat", [False, True])
def test_a_copy_of_what_stays_goes_without_a_trace(flat):
    torch.manual_seed(0)
    network, images = Twins(flat).eval(), digits(64)[0]
    small = {bias: copy.deepcopy(network) for bias in ("ridge", "mean")}
    arguments = {"budget": "candidates", "criterion": "magnitude", "scope": "layer", "progress": False}
    for bias, each in small.items():
        prune(each, loader(), 0.5, bias=bias, **arguments)
    assert [len(layer.weight) for layer in (small["ridge"].conv, small["ridge"].next)] == [4, 6]
    with torch.no_grad():
        error = {bias: (each(images) - network(images)).abs().max() for bias, each in small.items()}
    assert error["ridge"] < 0.3 * error["mean"]  # 64 instances do not tell more


def test_what_reads_the_groups_of_a_convolution_does_without_copies_too():
    """A unit is a channel of each group: to what reads them, one feature in two copies."""
    torch.manual_seed(0)
    grouped, last = nn.Conv2d(4, 16, 3, padding=1, groups=2), nn.Linear(16, 10)
    with torch.no_grad():
        for values in grouped.weight.view(2, 8, -1), grouped.bias.view(2, 8):
            values[:, 4:] = values[:, :4]
        last.weight.view(10, 2, 8)[..., 4:] *= 0.5
    network = nn.Sequential(nn.Conv2d(1, 4, 1), grouped, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()
    small, images = {bias: copy.deepcopy(network) for bias in ("ridge", "mean")}, digits(64)[0]
    for bias, each in small.items():
        prune(each, loader(), 0.5, bias=bias, budget="candidates", include="1", progress=False)
    assert len(small["ridge"][1].weight) == 8
    with torch.no_grad():
        error = {bias: (each(images) - network(images)).abs().max() for bias, each in small.items()}
    assert error["ridge"] < 0.8 * error["mean"]  # as above


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_pruned_by_default(name):
    network, inputs = build(name)
    before = sum(parameter.numel() for parameter in network.parameters())
    network, batches = network.eval(), [torch.randn(64, *inputs.shape[1:], dtype=inputs.dtype) for _ in range(2)]
    prune(network, batches, 0.3, progress=False)
    assert sum(parameter.numel() for parameter in network.parameters()) < before
    assert all(network(batch).isfinite().all() for batch in batches)


@pytest.mark.parametrize("name", ["regnet_x_400mf", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_networks_of_torchvision_are_pruned_by_default(name):
    network = torchvision.models.get_model(name, num_classes=10).eval()
    _, report = prune(network, [torch.randn(16, 3, 64, 64) for _ in range(4)], 0.4, progress=False)
    assert report.after.macs < 0.61 * report.before.macs


def test_what_is_read_in_another_order_than_it_is_made_goes_without_a_trace_too():
    """A skip connection: the later layer comes first in what is read."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late, self.last = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(16, 10)
            with torch.no_grad():
                for layer in (self.early, self.late):
                    layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4]

        def forward(self, images):
            early = self.early(images.flatten(1)).relu()
            return self.last(torch.cat([self.late(early).sigmoid(), early], 1))

    torch.manual_seed(0)
    network, images = Skip().eval(), digits(64)[0]
    small = {bias: copy.deepcopy(network) for bias in ("ridge", "zero")}
    for bias, each in small.items():
        prune(each, loader(), 0.5, bias=bias, budget="candidates", scope="layer", progress=False)
    assert [len(layer.weight) for layer in (small["ridge"].early, small["ridge"].late)] == [4, 4]
    with torch.no_grad():
        error = {bias: (each(images) - network(images)).abs().max() for bias, each in small.items()}
    assert error["ridge"] < 0.5 * error["zero"]  # as above


def test_a_weight_that_is_used_twice_is_left_alone():
    """It may multiply two inputs."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

        def forward(self, images):
            hidden = self.hidden(images.flatten(1)).relu()
            return self.last(hidden) + self.last(hidden**2)

    torch.manual_seed(0)
    network, images = Twice().eval(), digits(64)[0]
    small = {bias: copy.deepcopy(network) for bias in ("ridge", "zero")}
    for bias, each in small.items():
        prune(each, loader(), 0.3, bias=bias, budget="candidates", progress=False)
    assert len(small["ridge"].hidden.weight) == 11
    with torch.no_grad():
        torch.testing.assert_close(small["ridge"](images), small["zero"](images))


def test_what_a_buffer_multiplies_is_pruned_and_the_buffer_keeps_its_values():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(12, 10)
            self.register_buffer("basis", torch.randn(12, 16))

        def forward(self, images):
            hidden = self.norm(self.first(images.flatten(1))).relu()
            return self.last(nn.functional.linear(hidden, self.basis).relu())

    torch.manual_seed(0)
    network = Fixed().eval()
    basis = network.basis.clone()
    plan, _ = prune(network, loader(), 0.4, progress=False)
    rows, columns = (torch.tensor(plan.cuts["basis"].get(dim, range(basis.shape[dim]))) for dim in (0, 1))
    assert len(columns) < 16
    assert torch.equal(network.basis, basis[rows][:, columns])


def test_complex_weights_are_left_alone():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.next = (nn.Linear(*size, dtype=torch.complex64) for size in ((33, 16), (16, 8)))
            self.last = nn.Linear(8, 10)

        def forward(self, images):
            return self.last(self.next(self.hidden(torch.fft.rfft(images.flatten(1))).tanh()).abs())

    torch.manual_seed(0)
    network, images = Spectrum().eval(), digits(64)[0]
    small = {bias: copy.deepcopy(network) for bias in ("ridge", "zero")}
    for bias, each in small.items():
        prune(each, loader(), 0.5, include="hidden", bias=bias, budget="candidates", progress=False)
    assert len(small["ridge"].hidden.weight) == 8
    with torch.no_grad():
        torch.testing.assert_close(small["ridge"](images), small["zero"](images))
