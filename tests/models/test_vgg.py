import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen.models import VGG, vgg16_bn

# Configuration D of Simonyan and Zisserman, without the pooling after the last stage.
D = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]


def test_default_has_the_published_layers():
    net = vgg16_bn()
    assert isinstance(net, VGG)
    kinds = [type(module) for module in net.features]
    stage = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert kinds == [kind for entry in D for kind in ([nn.MaxPool2d] if entry == "M" else stage)]
    widths = [entry for entry in D if entry != "M"]
    convs = [module for module in net.features if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == widths
    assert all(conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.bias is None for conv in convs)
    assert sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)) == sum(widths) == 4_224
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(14.72e6, rel=0.001)


@pytest.mark.parametrize("side", [32, 40])
def test_any_resolution_and_number_of_classes(side):
    net = vgg16_bn(num_classes=7, in_channels=1)
    x = torch.randn(2, 1, side, side)
    assert net(x).shape == (2, 7)
    net.eval()
    assert torch.allclose(net(x), net.fc(F.adaptive_avg_pool2d(net.features(x), 1).flatten(1)), atol=1e-5)


def test_every_parameter_gets_a_gradient():
    net = vgg16_bn()
    F.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_narrower_one():
    widths = [
        module.num_features for module in vgg16_bn(width_mult=0.25).modules() if isinstance(module, nn.BatchNorm2d)
    ]
    assert widths == [entry // 4 for entry in D if entry != "M"]
    with pytest.raises(ValueError, match=r"width_mult=0.001 leaves .* no channel; give 0.015625 or more"):
        vgg16_bn(width_mult=0.001)


@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        vgg16_bn(**{name: value})
