"""Units that are always zero go where masks, quotients and lookups of positions pass zeros on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen import find_gates, slim

KEEP = torch.tensor([True, False, True, True, False, False, True, False])
Use = Callable[[Tensor, Tensor], Tensor]
"""(units, inputs) → what the next layer reads."""


class Network(nn.Module):
    """Units, what is done with them, and who reads that; of tokens (N, T, 6) or images (N, 3, H, W)."""

    def __init__(self, use: Use, images: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1) if images else nn.Linear(6, 8)
        self.second = nn.Conv2d(8, 5, 1) if images else nn.Linear(8, 5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.use(self.first(x), x))
        return out


def some(x: Tensor) -> Tensor:
    return x[..., :1] > 0


def first_column_zero(h: Tensor) -> Tensor:
    h = h.relu().clone()
    h[..., 0] = 0
    return h


def moved(h: Tensor) -> Tensor:
    turn = torch.eye(2, 3, dtype=h.dtype).expand(len(h), 2, 3) * 0.9
    return F.grid_sample(h.tanh(), F.affine_grid(turn, list(h.shape), align_corners=False), align_corners=False)


TOKENS: dict[str, Use] = {
    "masked_fill": lambda h, x: h.relu().masked_fill(~some(x), 0.0),
    "masked_fill by a tensor": lambda h, x: h.relu().masked_fill(~some(x), torch.tensor(0.0)),
    "where": lambda h, x: torch.where(some(x), h.relu(), 0.0),
    "where both are": lambda h, x: torch.where(some(x), h.relu(), 0.5 * h),
    "mean of some tokens": lambda h, x: (h.relu() * some(x)).sum(1) / some(x).sum(1).clamp(min=1),
    "quotient in place": lambda h, x: h.relu().div_(1 + x[..., :1].abs()),
    "compared with a number": lambda h, x: h * (h > 0),
    "of its own slope": lambda h, x: torch.where(h > 0, h, 0.1 * h),
    "any of two": lambda h, x: h * ((h > 0) | (h < -1)),
    "last token": lambda h, x: h.relu()[torch.arange(len(x)), some(x).sum((1, 2)).clamp(max=x.shape[1] - 1)],
    "blended": lambda h, x: torch.lerp(h, h.relu(), 0.3),
    "randomised slope": lambda h, x: F.rrelu(h),
    "thresholds": lambda h, x: F.softshrink(F.hardshrink(h)),
}
IMAGES: dict[str, Use] = {
    "a column of zeros": lambda h, x: first_column_zero(h),
    "read between positions": lambda h, x: moved(h),
    "one position": lambda h, x: h.relu()[:, :, torch.tensor([1, 2]), torch.tensor([0, 1])].unsqueeze(-1),
    "padding that does not count": lambda h, x: F.avg_pool2d(h.sigmoid(), 3, 1, 1, count_include_pad=False),
}
USES = [*((name, use, False) for name, use in TOKENS.items()), *((name, use, True) for name, use in IMAGES.items())]


def masked(network: Network) -> Network:
    reference = copy.deepcopy(network)
    with torch.no_grad():
        reference.first.weight[~KEEP] = reference.first.bias[~KEEP] = 0  # type: ignore[index]
    return reference


def example(images: bool, more: int = 0) -> Tensor:
    torch.manual_seed(1)
    return torch.randn((4, 3, 6 + more, 6 + more) if images else (4, 7 + more, 6), dtype=torch.float64)


@pytest.mark.parametrize(("use", "images"), [case[1:] for case in USES], ids=[case[0] for case in USES])
def test_they_are_removed_and_the_network_computes_what_the_masked_one_does(use: Use, images: bool) -> None:
    torch.manual_seed(0)
    network = Network(use, images).double()
    reference = masked(network)
    plan = slim(network, {"first": KEEP}, example(images))
    assert plan.removed == {"first": 4}
    for training in (True, False):
        for more in (0, 3):
            x = example(images, more)
            torch.manual_seed(2)
            expected = reference.train(training)(x)
            torch.manual_seed(2)
            own = network.train(training)(x)
            if use is not TOKENS["randomised slope"] or not training:  # fewer units draw fewer numbers
                torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("use", "reason"),
    {
        "another number": (lambda h, x: h.relu().masked_fill(~some(x), 1.0), "mixed with channels"),
        "another in its place": (lambda h, x: torch.where(some(x), h.relu(), 1.0), "mixed with channels"),
        "a divisor": (lambda h, x: some(x) / (1 + h.relu()), "mixed with channels"),
        "the largest of each unit": (
            lambda h, x: h[torch.arange(len(h))[:, None], h.argmax(1), torch.arange(8)],
            "takes elements apart by their numbers|not known to keep channels apart",
        ),
        "as many as there are": (lambda h, x: h.relu()[some(x)[..., 0]].sum(0, keepdim=True), "depends on values"),
    }.values(),
)
def test_what_is_no_zero_there_is_left_alone(use: Use, reason: str) -> None:
    torch.manual_seed(0)
    network = Network(use, images=False).double()
    (gate,) = [gate for gate in find_gates(network, example(False)) if gate.name == "first"]
    assert gate.excluded is not None
    assert re.search(reason, gate.excluded)


def test_zero_by_zero_is_none() -> None:
    """Where the masked network has no number for such a unit, nothing goes without an error."""
    network = Network(lambda h, x: (h / h.amax(1, keepdim=True)).nan_to_num(0.25), images=False).double()
    reference = masked(network)
    slim(network, {"first": KEEP}, example(False))
    torch.testing.assert_close(network(example(False)), reference(example(False)), rtol=1e-9, atol=1e-9)
