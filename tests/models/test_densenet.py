import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen.models import DenseNet, densenet40
from lightning_fscreen.models.densenet import DenseLayer, Transition


def test_default_has_the_published_size():
    net = densenet40()
    norms = [module.num_features for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert isinstance(net, DenseNet)
    assert sum(norms) == 9_360
    assert norms[:13] == [*range(24, 168, 12), 168]
    assert norms[-1] == 24 + 3 * 12 * 12
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 39
    # Published as 1.0 M.
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(1.06e6, rel=0.01)


@pytest.mark.parametrize("side", [32, 40])
def test_any_resolution_and_number_of_classes(side):
    net = densenet40(num_classes=7, in_channels=1)
    x = torch.randn(2, 1, side, side)
    assert net.layers(net.stem(x)).shape == (2, 456, side // 4, side // 4)
    assert net(x).shape == (2, 7)


def test_every_parameter_gets_a_gradient():
    net = densenet40()
    F.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_layer_appends_to_its_input():
    layer, x = DenseLayer(24, 12), torch.randn(2, 24, 8, 8)
    out = layer(x)
    assert torch.equal(out[:, :24], x)
    expected = F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), layer.conv.weight, padding=1)
    assert torch.allclose(out[:, 24:], expected, atol=1e-5)


def test_a_transition_keeps_the_width_and_halves_the_resolution():
    transition, x = Transition(24), torch.randn(2, 24, 8, 8)
    inner = F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), transition.conv.weight)
    expected = inner.view(2, 24, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(transition(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        densenet40(**{name: value})
