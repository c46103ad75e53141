"""Means over channels: what goes from them is made up for by eps and gain, exactly, or stays with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen import find_gates, load_slimmed, save_slimmed, slim
from lightning_fscreen.slimming import PlanError, SlimmingPlan
from lightning_fscreen.slimming.resize import slim_like
from tests.slimming.masked import CASES
from tests.slimming.test_units import Residual, check, masked

KEEP = torch.arange(12) % 3 > 0


class Written(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, width: int, eps: float = 0.1) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


class Rooted(Written):
    """From a root, the gain as a view, with a shift."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        root = ((x * x).mean(dim=-1, keepdim=True) + self.variance_epsilon).sqrt()
        return x * root.reciprocal() * self.weight.view(1, -1) + self.bias


class Response(nn.Module):
    """Global response normalisation, channels last, in two ways."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        shape = (width,) if fused else (1, 1, 1, width)
        self.gamma, self.beta = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.eps, self.fused = 0.1, fused

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        response = response / (response.mean(-1, keepdim=True) + self.eps)
        if self.fused:
            return x + torch.addcmul(self.beta.view(1, 1, 1, -1), self.gamma.view(1, 1, 1, -1), x * response)
        return self.gamma * (x * response) + self.beta + x


class Literal(nn.Module):
    """Its eps is a number in the code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 0.1) * self.gain


class Twice(Written):
    """The mean is an output of its own."""

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon)) + variance


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "torch": lambda width: nn.RMSNorm(width, eps=0.1),
    "torch, no eps": nn.RMSNorm,
    "written": Written,
    "rooted": Rooted,
}


def mlp(norm: Callable[[int], nn.Module], shape: tuple[int, ...] = (5,)) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), norm(12), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for parameter in net[2].parameters():
        nn.init.normal_(parameter)
    return net, torch.randn(*shape, 3, dtype=torch.float64)


@pytest.mark.parametrize("bias", ["zero", "fold"])
@pytest.mark.parametrize("name", NORMS)
def test_silent_channels_go_from_an_rms_norm(name: str, bias: str) -> None:
    net, x = mlp(NORMS[name])
    with torch.no_grad():
        net[0].bias[::2] = -1.0  # what ReLU makes zero goes with its bias, too; what it lets through stays
        net[0].bias[1::2] = 1.0
    gates = {gate.name: gate for gate in find_gates(net, x)}
    assert gates["0"].excluded is None
    check(net, x, 0.5, 1, bias)
    assert len(net[2].weight) < 12


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_hidden_units_go_from_a_global_response_norm(fused: bool, bias: str) -> None:
    net, x = mlp(lambda width: Response(width, fused), (2, 4, 4))
    removed = check(net, x, 0.5, 1, bias)
    assert net[2].beta.numel() < 12 and removed > 0


def test_a_stream_that_only_rms_norms_read_can_lose_channels() -> None:
    torch.manual_seed(0)
    blocks = [Residual(nn.RMSNorm(8, eps=0.1), nn.Linear(8, 8, bias=False), nn.ReLU()) for _ in range(2)]
    net = nn.Sequential(nn.Linear(3, 8), *blocks, Written(8), nn.Linear(8, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert check(net, x, 0.5, 0, "zero") > 0 and net[0].out_features < 8


def test_a_constant_that_is_not_zero_stays_in_the_mean_and_find_gates_says_so() -> None:
    net, x = mlp(nn.RMSNorm)
    net[1] = nn.Sigmoid()
    excluded = find_gates(net, x)[0].excluded
    assert excluded is not None and "'2' averages it with all other channels" in excluded


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*NORMS.values(), partial(Response, fused=True), partial(Response, fused=False)]),
            st.sampled_from([nn.ReLU, nn.GELU, nn.Sigmoid, nn.Identity]),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(0.1, 0.9),
    st.integers(0, 99),
    st.sampled_from(["zero", "fold"]),
)
def test_any_chain_of_such_norms_is_exact(blocks: list[Any], amount: float, seed: int, bias: str) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(3, 6)]
    for norm, activation, residual in blocks:
        layer = nn.Linear(6, 6, bias=bool(seed % 3))
        layers += [Residual(norm(6), layer, activation())] if residual else [layer, activation(), norm(6)]
    net = nn.Sequential(*layers, nn.Linear(6, 2)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    check(net, torch.randn(2, 3, 3, 3, dtype=torch.float64), amount, seed, bias)


@pytest.mark.parametrize("norm", [Literal, Twice, lambda width: nn.RMSNorm(width, elementwise_affine=False)])
def test_what_nothing_can_make_up_for_stays_and_says_why(norm: Callable[[int], nn.Module]) -> None:
    net, x = mlp(norm)
    excluded = find_gates(net, x)[0].excluded
    reasons = {Literal: "the eps that is added to it is no attribute of its module", Twice: "it is used more than once"}
    assert excluded is not None and reasons.get(norm, "has no gain that could take over") in excluded  # type: ignore[call-overload]
    check(net, x, 0.5, 1, "zero")


def test_small_values_in_float32_feel_the_eps_of_float32() -> None:
    """Activations of the size of its root: with the eps of float64, or the one of before, they would be far off."""
    net, x = mlp(nn.RMSNorm)
    with torch.no_grad():
        net[0].weight *= 3e-4
        net[0].bias *= 0
    net, x = net.float(), x.float()
    reference = masked(net, {"0": KEEP}, "zero")
    slim(net, {"0": KEEP}, x)
    assert net[2].eps == pytest.approx(1.5 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(net(x), reference(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["torch, no eps", "written"])
def test_a_plan_carries_eps(name: str, tmp_path: Path) -> None:
    net, x = mlp(NORMS[name])
    fresh = copy.deepcopy(net)
    slim(net, {"0": KEEP}, x)
    plan = slim(net, {"0": torch.arange(8) > 1}, x)  # again
    attribute = "eps" if name != "written" else "variance_epsilon"
    assert plan.attributes["2"][attribute][1] == getattr(net[2], attribute)
    save_slimmed(net, tmp_path / "slim.safetensors")
    again = load_slimmed(copy.deepcopy(fresh), tmp_path / "slim.safetensors")
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("value", ["0.2", "NaN", "-1.0", "null", "3", "[3]", "true", '"0.15"'])
def test_a_plan_with_another_eps_is_refused(value: str) -> None:
    net, x = mlp(NORMS["torch"])
    fresh = copy.deepcopy(net)
    text = slim(net, {"0": KEEP}, x).to_json()
    changed = text.replace(str(net[2].eps), value)
    assert changed != text
    with pytest.raises(PlanError):
        slim_like(fresh, SlimmingPlan.from_json(changed))
    slim_like(fresh, SlimmingPlan.from_json(text))
    assert fresh[2].eps == net[2].eps and fresh[2].normalized_shape == (8,)


def test_functional_rms_norm_without_a_module_of_its_own_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gain, self.last = nn.Linear(3, 12), nn.Parameter(torch.ones(12)), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.rms_norm(self.first(x), (12,), self.gain, 1e-3))

    excluded = find_gates(Net(), torch.randn(4, 3))[0].excluded
    assert excluded is not None and "are no attributes of its module" in excluded
