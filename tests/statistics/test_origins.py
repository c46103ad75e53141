from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fscreen.statistics.origins import is_learned


def seen(network, x):
    """Whether what the last layer reads is learned."""
    found = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda module, args: found.append(is_learned(args[0])))
    network(x)
    handle.remove()
    return found[0]


X = torch.randn(8, 4)


@pytest.mark.parametrize(
    ("layers", "learned"),
    [
        ([], False),
        ([nn.Dropout(0.5), nn.ReLU()], False),
        ([nn.BatchNorm1d(4)], False),
        ([nn.LayerNorm(4), nn.PReLU(4)], False),
        ([nn.Linear(4, 4)], True),
        ([nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)], True),
        ([nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1), nn.Flatten()], True),
    ],
)
def test_features_are_learned_behind_weight_matrices_that_are_trained(layers, learned):
    assert seen(nn.Sequential(*layers, nn.Linear(4, 2)), X) is learned


def test_what_frozen_layers_make_of_the_inputs_is_given():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    assert not seen(network, X)
    assert not seen(network, X.clone().requires_grad_())


def test_embeddings_and_sums_with_something_learned_are_learned():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x + self.embedding(torch.zeros(len(x), dtype=torch.long)))

    assert seen(Positions(), X)


def test_without_a_graph_the_answer_is_yes():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        assert is_learned(X)
        assert seen(network, X)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert seen(lambda_module(lambda x: checkpoint(inner, x.requires_grad_(), use_reentrant=True), inner), X.clone())


def lambda_module(function, inner):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return function(x)

    return Calls()
