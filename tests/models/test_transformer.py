"""The small transformers."""

import pytest
import torch

from lightning_fscreen import find_gates, models


@pytest.mark.parametrize(
    ("network", "x", "size", "units"),
    [
        (models.vit(), torch.randn(2, 3, 32, 32), 459_370, [6, 384] * 4),
        (models.text_transformer(), torch.randint(100, (2, 16)), 107_780, [8, 256] * 2),
    ],
    ids=["vit", "text"],
)
def test_sizes_are_those_of_the_docstring_and_heads_and_hidden_units_can_go(network, x, size, units):
    assert sum(parameter.numel() for parameter in network.parameters()) == size
    assert network(x).shape[0] == 2
    prunable = [(gate.channels, gate.kind) for gate in find_gates(network, x) if gate.excluded is None]
    assert prunable == list(zip(units, ["head", "neuron"] * (len(units) // 2), strict=True))


@pytest.mark.parametrize("arguments", [{"heads": 5}, {"depth": 0}, {"patch": 5}, {"num_classes": 0}])
def test_bad_sizes_are_named(arguments):
    with pytest.raises(ValueError, match="must"):
        models.vit(**arguments)


@pytest.mark.parametrize("arguments", [{"words": 0}, {"num_classes": 0}])
def test_bad_sizes_of_texts_are_named(arguments):
    with pytest.raises(ValueError, match="num_classes and words must be at least 1"):
        models.text_transformer(**arguments)
