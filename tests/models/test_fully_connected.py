import torch

from lightning_fscreen.models import mlp


def test_widths_are_as_asked_and_relu_stands_between():
    torch.manual_seed(0)
    net = mlp(num_classes=3, in_features=12, hidden=[7, 5])
    assert [tuple(layer.weight.shape) for layer in net.layers] == [(7, 12), (5, 7), (3, 5)]
    x = torch.randn(4, 1, 3, 4)
    hidden = x.flatten(1)
    for layer in net.layers[:-1]:
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(net(x), hidden @ net.layers[-1].weight.T + net.layers[-1].bias)
    assert len(mlp(hidden=[]).layers) == 1
