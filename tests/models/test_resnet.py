import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen.models import PreActResNet, resnet20, resnet164
from lightning_fscreen.models.resnet import PreActBlock


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def size(net):
    return sum(parameter.numel() for parameter in net.parameters())


def test_resnet164_has_the_published_size():
    net = resnet164()
    assert isinstance(net, PreActResNet)
    assert sum(norm.num_features for norm in norms(net)) == 12_112
    assert len(norms(net)) == 3 * 54 + 1
    assert size(net) == pytest.approx(1.70e6, rel=0.01)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 163 + 3


def test_resnet20_has_the_published_size():
    net = resnet20()
    assert sum(norm.num_features for norm in norms(net)) == 688
    assert len(norms(net)) == 2 * 9 + 1
    assert size(net) == pytest.approx(0.27e6, rel=0.02)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 19 + 2


@pytest.mark.parametrize(("build", "width"), [(resnet164, 256), (resnet20, 64)])
@pytest.mark.parametrize("side", [32, 40])
def test_any_resolution_and_number_of_classes(build, width, side):
    net = build(num_classes=7, in_channels=1)
    assert net.blocks(net.stem(torch.randn(2, 1, side, side))).shape == (2, width, side // 4, side // 4)
    assert net(torch.randn(2, 1, side, side)).shape == (2, 7)


@pytest.mark.parametrize("build", [resnet164, resnet20])
def test_every_parameter_gets_a_gradient(build):
    net = build()
    F.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("block", "reshaped"),
    [
        (PreActBlock(16, 16), False),
        (PreActBlock(16, 32, stride=2), True),
        (PreActBlock(64, 16, bottleneck=True), False),
        (PreActBlock(16, 16, bottleneck=True), True),
        (PreActBlock(64, 32, stride=2, bottleneck=True), True),
    ],
)
def test_a_block_adds_to_its_raw_input(block, reshaped):
    x = torch.randn(2, block.norms[0].num_features, 8, 8)
    inner = x
    for norm, conv in zip(block.norms, block.convs, strict=True):
        inner = conv(F.relu(F.batch_norm(inner, None, None, norm.weight, norm.bias, training=True)))
    assert isinstance(block.shortcut, nn.Conv2d) == reshaped
    stream = F.conv2d(x, block.shortcut.weight, stride=block.shortcut.stride) if reshaped else x
    assert torch.allclose(block(x), stream + inner, atol=1e-5)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_first_3_by_3_convolution_carries_the_stride(bottleneck):
    strided = [conv.kernel_size for conv in PreActBlock(16, 8, 2, bottleneck).convs if conv.stride == (2, 2)]
    assert strided == [(3, 3)]


def test_initial_weights_have_variance_two_by_fan_out():
    for conv in (module for module in resnet20().modules() if isinstance(module, nn.Conv2d)):
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        # The standard deviation of n normal values is known to about 1 / √(2n).
        tolerance = 5 / math.sqrt(2 * conv.weight.numel())
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance)


@pytest.mark.parametrize("build", [resnet164, resnet20])
@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1])
def test_arguments_are_checked(build, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        build(**{name: value})
