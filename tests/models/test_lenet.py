import torch
from torch import nn

from lightning_fscreen.models import LeNet300100, lenet300_100


def test_default_has_the_published_size():
    assert sum(p.numel() for p in lenet300_100().parameters()) == 266_610


def test_forward_equals_the_layers_in_sequence():
    net = lenet300_100(num_classes=7, in_features=64)
    reference = nn.Sequential(nn.Flatten(), net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3)
    x = torch.randn(5, 1, 8, 8)
    assert isinstance(net, LeNet300100)
    assert net(x).shape == (5, 7)
    assert torch.equal(net(x), reference(x))


def test_with_batch_norm_equals_the_layers_in_sequence():
    net = lenet300_100(num_classes=7, in_features=64, batch_norm=True)
    assert [type(net.norm1), type(net.norm2)] == [nn.BatchNorm1d, nn.BatchNorm1d]
    assert net.fc1.bias is None and net.fc2.bias is None
    reference = nn.Sequential(nn.Flatten(), net.fc1, net.norm1, nn.ReLU(), net.fc2, net.norm2, nn.ReLU(), net.fc3)
    net.eval()
    x = torch.randn(5, 1, 8, 8)
    assert net(x).shape == (5, 7)
    assert torch.equal(net(x), reference(x))
