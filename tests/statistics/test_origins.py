from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fscreen.statistics.origins import learned_features


def seen(network, x):
    """Whether what the last layer reads is learned."""
    found = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda module, args: found.append(bool(learned_features(args[0], 1).all())))
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
        assert learned_features(X, 1).all()
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


class Table(nn.Module):
    """Numbers beside embeddings, (N, 4 + 2 + 3), in an order of their own."""

    def __init__(self, join, rest):
        super().__init__()
        self.small, self.large, self.norm = nn.Embedding(5, 2), nn.Embedding(5, 3), nn.BatchNorm1d(4)
        self.join, self.rest = join, rest

    def forward(self, x):
        kinds = torch.arange(len(x)) % 5
        return self.rest(self.join(x, self.norm(x), self.small(kinds), self.large(kinds)))


def nothing(x):
    return x


@pytest.mark.parametrize(
    ("join", "learned"),
    [
        (lambda x, n, s, b: torch.cat([x, s, b], 1), [0] * 4 + [1] * 5),
        (lambda x, n, s, b: torch.cat([s, x, b], -1), [1] * 2 + [0] * 4 + [1] * 3),
        (lambda x, n, s, b: torch.hstack([s, n, b]), [1] * 2 + [0] * 4 + [1] * 3),
        (lambda x, n, s, b: torch.cat([s, x, x[:, :0], x[:, 1:2], b], 1), [1] * 2 + [0] * 5 + [1] * 3),
        (lambda x, n, s, b: torch.cat([torch.cat([s, b], 1), n, x], 1), [1] * 5 + [0] * 8),
        (lambda x, n, s, b: torch.cat([x, n, s], 1) * torch.cat([n, s, x], 1), [0] * 4 + [1] * 2 + [0] * 2 + [1] * 2),
        (lambda x, n, s, b: torch.cat([n + s.sum(1, keepdim=True), b], 1), [1] * 7),  # broadcast
        (lambda x, n, s, b: torch.cat([n, b @ b.T], 1), [0] * 4 + [1] * 8),
        (lambda x, n, s, b: torch.cat([x, s, x, b], 1), [1] * 13),  # nobody knows where they begin
    ],
)
@pytest.mark.parametrize(
    "rest",
    [
        nothing,
        nn.Dropout(0.5),
        nn.ReLU(),
        lambda x: nn.BatchNorm1d(x.shape[1])(x),
        lambda x: x.bfloat16().tanh(),
    ],
    ids=["nothing", "dropout", "relu", "batch norm", "half, tanh"],
)
def test_features_side_by_side_have_answers_of_their_own(join, learned, rest):
    assert learned_features(Table(join, rest)(X), 1).int().tolist() == learned


@pytest.mark.parametrize("mix", [lambda x: nn.LayerNorm(x.shape[1])(x), lambda x: x.flip(1), lambda x: x.cumsum(1)])
def test_features_that_were_mixed_share_an_answer(mix):
    assert learned_features(Table(lambda x, n, s, b: torch.cat([n, s], 1), mix)(X), 1).all()


def test_the_dimension_of_the_features_counts():
    """Tokens side by side are no features; channels of images are."""
    tokens, embedding = torch.randn(2, 5, 3), nn.Embedding(4, 3)
    longer = torch.cat([tokens, embedding(torch.zeros(2, 1, dtype=torch.long))], 1)
    assert learned_features(longer, 2).all()
    images, own = torch.randn(2, 3, 4, 4), nn.Conv2d(3, 2, 1)
    assert learned_features(torch.cat([own(images), images], 1), 1).tolist() == [True] * 2 + [False] * 3


@pytest.mark.parametrize("step", [lambda x: x * torch.sigmoid(x), lambda x: x + 1], ids=["branching", "long"])
def test_far_away_all_features_are_taken_for_learned(step):
    """In less than the time, and the depth, that all ways back would take."""
    network = Table(
        lambda x, n, s, b: torch.cat([x, s], 1), lambda x: functools.reduce(lambda y, _: step(y), range(2000), x)
    )
    assert learned_features(network(X), 1).all()
