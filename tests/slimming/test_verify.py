"""Verification: the outputs of a network, before and after."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from contextlib import suppress
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_fscreen.slimming import VerificationError, double, slim
from lightning_fscreen.slimming.verify import Verification
from tests.pretended import pretended, pretending
from tests.slimming import snapshot, untouched

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def verified(network: nn.Module, training: bool = True, x: Tensor = X) -> Verification:
    return Verification(network, (x,), {}, training)


def mlp(*middle: nn.Module) -> Any:
    return nn.Sequential(nn.Linear(3, 6), *middle, nn.Linear(6, 2))


def halve(network: Any) -> dict[str, Tensor]:
    """Take hidden units 1, 3, 5 from a network whose last layer does not read them."""
    first, last = network[0], network[-1]
    with torch.no_grad():
        first.weight, first.bias = nn.Parameter(first.weight[::2]), nn.Parameter(first.bias[::2])
        last.weight = nn.Parameter(last.weight[:, ::2])
    return {}


def unread(network: Any) -> Any:
    with torch.no_grad():
        network[-1].weight[:, 1::2] = 0
    return network


def test_what_has_not_changed_passes_and_nothing_is_touched() -> None:
    network = mlp(nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU())
    network[2].eval()
    before, modes, state = snapshot(network), [m.training for m in network.modules()], torch.get_rng_state()
    x = X.clone()
    verified(network, x=x).check({})
    assert untouched(network, before) and torch.equal(torch.get_rng_state(), state) and torch.equal(x, X)
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize("training", [True, False])
def test_a_unit_that_nobody_reads_may_go(training: bool) -> None:
    network = unread(mlp(nn.Tanh()))
    verification = verified(network, training)
    verification.check(halve(network))


@pytest.mark.parametrize(
    "drop", [nn.Dropout(), nn.Dropout(inplace=True), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Dropout1d()]
)
def test_dropout_does_not_count(drop: nn.Module) -> None:
    network = unread(mlp(drop))
    verification = verified(network)
    verification.check(halve(network))


def test_functional_dropout_does_not_count() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = unread(mlp())

        def forward(self, x: Tensor) -> Any:
            h = F.dropout(self.body[0](x), 0.5, self.training)
            return self.body[1](torch.dropout(h, 0.3, self.training))

    network = Net()
    verification = verified(network)
    verification.check(halve(network.body))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.5) if self.training else x


def test_noise_is_the_same_before_and_after() -> None:
    network = unread(mlp(Noise(), nn.Dropout()))
    verification = verified(network)
    torch.rand(7)  # whatever is drawn between
    verification.check(halve(network))


@pytest.mark.parametrize("asks", [False, True])
def test_so_is_that_of_networks_which_draw_it_in_eval_mode(asks: bool) -> None:
    """A variational autoencoder, dropout that is never off; whether forward asks for the mode or not."""

    class Sampling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x + torch.randn(len(x), 1, dtype=x.dtype) * (2.0 if asks and self.training else 1.0), 0.3)

    network, numbers = unread(mlp(Sampling())), torch.get_rng_state()
    verification = verified(network)
    assert torch.equal(torch.get_rng_state(), numbers)
    torch.rand(7)
    verification.check(halve(network))


@given(st.integers(0, 5), st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_change_is_found_whatever_the_scale(unit: int, scale: float) -> None:
    network = mlp(nn.Sigmoid())
    with torch.no_grad():
        network[2].weight.mul_(scale)
    verification, before = verified(network), network[2].weight.detach().clone()
    with torch.no_grad():
        network[2].weight[0, unit] += 1e-5 * scale
    with pytest.raises(VerificationError, match=r"Sequential would change its outputs by .* in train or eval mode"):
        verification.check({})
    network[2].weight = nn.Parameter(before)
    verification.check({})


def test_a_change_that_only_train_mode_shows_is_found_in_train_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return {"out": self.fc(x), "aux": self.aux(x) if self.training else None}

    network = Net()
    both, evaluation = verified(network), verified(network, training=False)
    nn.init.zeros_(network.aux.weight)
    evaluation.check({})
    with pytest.raises(VerificationError, match="in train mode"):
        both.check({})


def test_new_tensors_are_used_in_float64() -> None:
    """What float32 rounds away is not held against the smaller network."""
    network = mlp()
    verification = verified(network)
    exact = network[1].bias.detach().double()
    network[1].bias = nn.Parameter(network[1].bias.detach() + 1e-3)
    verification.check({"1.bias": double.Exact(exact)})
    with pytest.raises(VerificationError):
        verification.check({})


def test_a_network_that_insists_on_its_dtype_is_verified_in_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x.float())

    network = Net()
    verification = verified(network)
    with torch.no_grad():
        network.fc.weight.mul_(1 + 1e-6)
    verification.check({})
    with torch.no_grad():
        network.fc.weight.mul_(1.01)
    with pytest.raises(VerificationError):
        verification.check({})


class Gives(nn.Module):
    """Whatever it is told to."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x), self.what


INFINITE = torch.tensor([1.0, float("inf")])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2).half()),
        (torch.ones(2), None),
        (torch.ones(2), torch.tensor([1.0, float("nan")])),
        (INFINITE, -INFINITE),
        (INFINITE, torch.ones(2)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        (3, 4),
        (3, 3.0),
        ([1.0], [1.0, 2.0]),
        (torch.zeros(2), torch.full((2,), 1e-6)),
    ],
)
def test_outputs_that_differ_in_kind_are_found(before: Any, after: Any) -> None:
    network = Gives(before)
    verification = verified(network)
    verification.check({})
    network.what = after
    with pytest.raises(VerificationError, match="Gives"):
        verification.check({})


@pytest.mark.parametrize(
    "what", [INFINITE, torch.tensor(float("nan")), torch.zeros(0), torch.zeros(2), None, "text", {"a": [1, None]}]
)
def test_outputs_of_any_kind_equal_themselves(what: Any) -> None:
    verified(Gives(what)).check({})


def test_a_forward_that_fails_afterwards_says_how() -> None:
    network = mlp()
    verification = verified(network)
    network[0] = nn.Linear(3, 5)
    with pytest.raises(VerificationError, match="forward of Sequential fails on the smaller network.*RuntimeError"):
        verification.check({})


def test_a_network_that_fails_on_its_own_example_is_refused() -> None:
    with pytest.raises(VerificationError, match="Sequential fails"):
        verified(mlp(), x=torch.randn(4, 5))


def test_outputs_that_are_all_nan_verify_nothing() -> None:
    network = mlp(nn.ReLU())
    with torch.no_grad():
        network[-1].bias[0] = torch.nan
    verified(network).check({})  # the other output is compared
    with torch.no_grad():
        network[0].bias.fill_(torch.nan)
    with pytest.raises(VerificationError, match="all outputs of Sequential are NaN"):
        verified(network)


def test_a_network_that_is_only_finite_in_its_own_dtype_is_verified_in_it() -> None:
    """Its mask is float32, with the least number of the dtype that it computes in: -inf where that is float64."""

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            least = torch.tensor(torch.finfo(y.dtype).min, dtype=y.dtype).float()
            return y + (least - least)

    network = Masked(4, 3)
    verification = Verification(network, (torch.randn(4, 4),), {}, training=True)
    verification.check({})
    with torch.no_grad():
        network.weight[1] += 0.1
    with pytest.raises(VerificationError, match="would change its outputs"):
        verification.check({})


def test_buffers_and_inputs_that_forward_writes_are_put_back() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            x += self.calls
            return self.fc(x)

    network, x = Writes(), X.clone()
    verified(network, x=x).check({})
    assert float(network.calls) == 0 and torch.equal(x, X)


def tf32() -> list[Any]:
    """Every switch that lets float32 products lose digits; none of them warns."""
    if hasattr(torch.backends.cudnn, "conv"):
        switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        return [switch.fp32_precision for switch in switches]
    return [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fails", [False, True])
def test_there_is_no_tf32_in_the_networks_own_dtype(fails: bool) -> None:
    seen: list[list[Any]] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            if self.fc.weight.dtype == torch.float64:
                raise TypeError("float32 only")
            seen.append(tf32())
            if fails:
                raise RuntimeError("later, too")
            return self.fc(x)

    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        before = tf32()
        with suppress(VerificationError):
            verified(Net()).check({})
        assert tf32() == before and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(was)
    off = ["ieee"] * 3 if len(before) == 3 else ["highest", False]
    assert seen and all(flags == off != before for flags in seen)


def test_a_large_layer_is_converted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double, "BLOCK", 4)
    network = mlp(nn.Tanh())
    with torch.no_grad(), double.InDouble(network, {}):
        out = network(X.double())
    expected = network.double()(X.double())
    assert out.dtype == torch.float64 and torch.allclose(out, expected, rtol=1e-12)


def test_blocks_of_a_convolution_carry_exact_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double, "BLOCK", 20)
    layer, x, column = nn.Conv1d(3, 7, 3, padding=1), torch.randn(2, 3, 5).double(), torch.randn(7, 3).double()
    with torch.no_grad(), double.InDouble(layer, {"weight": double.Exact(column, 1, 2)}):
        out = layer(x)
    expected = layer.double()
    expected.weight.data[:, 2] = column
    assert torch.allclose(out, expected(x), rtol=1e-12)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


def test_parameters_that_python_does_not_see_used_are_copied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, x: Tensor) -> Any:
            return Scaled.apply(x, self.weight)

    network = Net()
    verification = verified(network)
    with torch.no_grad():
        network.weight += 1e-6  # float64 sees it, float32 would allow it
    with pytest.raises(VerificationError):
        verification.check({})


def test_a_failing_forward_keeps_no_tensors() -> None:
    held: list[weakref.ref[Tensor]] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            copy = x * 2
            held.append(weakref.ref(copy))
            raise RuntimeError("no")

    with pytest.raises(VerificationError) as caught:
        verified(Net())
    assert held and all(reference() is None for reference in held)
    assert caught.value.__cause__ is not None and caught.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_accelerator_without_room_leaves_it_to_the_cpu(when: str) -> None:
    devices: list[str] = []

    class Net(nn.Module):
        full = when == "before"

        def __init__(self) -> None:
            super().__init__()
            self.body = unread(mlp(nn.BatchNorm1d(6)))

        def forward(self, x: Tensor) -> Any:
            devices.append(x.device.type)
            if self.full and x.device.type == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert self.body[0].weight.device.type == x.device.type
            return self.body(x)

    with pretending():
        network = Net().to("cuda")
        verification = verified(network, x=X.to("cuda"))
        network.full = True
        verification.check({})
        assert devices[0] == "cuda" and devices[-1] == "cpu"
        with torch.no_grad():
            network.body[2].weight[0, 0] += 1e-5
        with pytest.raises(VerificationError, match="would change its outputs"):
            verification.check({})
        assert pretended(network.body[2].weight).type == "cuda"


def test_a_network_without_room_that_needs_its_device_is_verified_there_in_its_own_dtype() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            if x.dtype == torch.float64:
                raise torch.OutOfMemoryError("CUDA out of memory") if x.device.type == "cuda" else OSError("no CPU")
            return self.fc(x)

    with pretending():
        verified(Net().to("cuda"), x=X.to("cuda")).check({})


@pytest.mark.parametrize("fails", [False, True])
def test_an_attempt_that_failed_holds_no_memory(fails: bool) -> None:
    """The traceback of its error would, with the frames of forward, as long as another attempt runs."""
    held: list[Any] = []
    alive: list[bool] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            alive.extend(reference() is not None for reference in held)
            copy = x.clone()
            held.append(weakref.ref(copy))
            if fails or copy.dtype == torch.float64:
                raise TypeError("float32 only")
            return self.fc(copy)

    gc.disable()
    try:
        with suppress(VerificationError):
            verified(Net()).check({})
        assert len(held) >= 3 and not any(alive)
    finally:
        gc.enable()


def test_a_compiled_network_is_run_as_it_was_written() -> None:
    compiled = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    network = mlp(nn.ReLU())
    network.compile(backend=backend)
    verified(network).check({})
    assert not compiled
    network(X)
    assert compiled


@pytest.mark.parametrize(("used", "where"), [(torch.zeros(4, 3), "noise"), (torch.full((4, 3), 1e6), "the example")])
def test_it_runs_on_the_example_and_on_noise(used: Tensor, where: str) -> None:
    """Zeros show no weights, and noise no values that are far from it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.far = nn.Linear(3, 2), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.far * (x.abs() > 1e5).sum(1, keepdim=True) * self.fc(x)

    for batch in (used, used[:1]):
        network = Net()
        verification = verified(network, x=batch)
        with torch.no_grad():
            (network.fc.weight if where == "noise" else network.far).mul_(1.01)
        with pytest.raises(VerificationError):
            verification.check({})


class Table(nn.Module):
    """Its first column is a category, given as a number beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(5, 4), nn.Linear(7, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        category, numbers = self.embed(x[:, 0].long()), x[:, 1:]
        return cast(Tensor, self.last(self.first(torch.cat([category, numbers], 1)).relu()))


def test_numbers_that_are_categories_are_no_noise() -> None:
    network, x = Table(), torch.cat([torch.randint(5, (8, 1)).float(), torch.randn(8, 3)], 1)
    with torch.no_grad():
        network.first.bias.normal_()
    masked = copy.deepcopy(network)
    with torch.no_grad():
        masked.first.weight[9:] = masked.first.bias[9:] = 0
    assert slim(network, {"first": torch.arange(16) < 9}, x).removed == {"first": 7}
    torch.testing.assert_close(network(x), masked(x))


class Counting(nn.Module):
    """Draws from NumPy and Python, anneals a temperature with every call, and notes what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.temperature = nn.Linear(3, 8), nn.Linear(8, 2), 1.0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.temperature *= 0.9
        self.seen.append(len(x))
        order = torch.from_numpy(np.random.permutation(len(x)))
        hidden = self.first(x * random.uniform(0.5, 1.5)).relu()
        return cast(Tensor, self.last((hidden + hidden[order]) / self.temperature))


def test_what_forward_notes_and_draws_is_as_before_and_the_same_in_every_run() -> None:
    network = Counting()
    network(X)
    seen = network.seen
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert slim(network, {"first": torch.arange(8) < 5}, X).removed == {"first": 3}
    assert network.temperature == 0.9 and network.seen is seen and network.seen == [4]
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
