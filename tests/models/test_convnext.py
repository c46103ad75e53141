"""The small ConvNeXt."""

import pytest
import torch
from torch import nn

from lightning_fscreen import find_gates, models


def test_sizes_are_those_of_the_docstring_and_the_blocks_can_lose_their_hidden_units():
    network, images = models.convnext(), torch.randn(2, 3, 32, 32)
    assert sum(parameter.numel() for parameter in network.parameters()) == 910_618
    assert network(images).shape == (2, 10)
    prunable = {gate.name: gate.channels for gate in find_gates(network, images) if gate.excluded is None}
    assert list(prunable.values()) == [192, 192, 384, 384, 768, 768] and all(
        name.endswith("expand") for name in prunable
    )


def test_blocks_begin_as_the_identity_and_weights_as_in_the_paper():
    network, x = models.convnext(widths=(8,), depths=(3,), patch=2), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(network.features[2:](x), x, atol=1e-4, rtol=0)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert not any(layer.bias.any() for layer in layers)
    assert all(float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.3) for layer in layers)


@pytest.mark.parametrize("arguments", [{"widths": (8, 8), "depths": (1,)}, {"widths": (), "depths": ()}, {"patch": 0}])
def test_bad_sizes_are_named(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        models.convnext(**arguments)
