from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_fscreen import find_gates, slim
from lightning_fscreen.modules import evaluating, named_tensors
from lightning_fscreen.slimming.capture import CaptureError, capture
from tests.slimming import snapshot, untouched


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("offset", torch.zeros(1), persistent=False)
        self.norm.eval()

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        h = self.drop(self.norm(self.conv(x))).relu().mean((2, 3))
        return self.fc(h) + self.offset + (0 if scale is None else scale)


def operators(network: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[str]:
    graph = capture(network, args, kwargs).graph
    return [
        node.target.name().removeprefix("aten::").split(".")[0] for node in graph.nodes if node.op == "call_function"
    ]


def test_the_graph_holds_the_layers_as_they_were_written() -> None:
    assert operators(Net(), torch.randn(2, 1, 5, 5))[:4] == ["conv2d", "batch_norm", "dropout", "relu"]


def test_every_placeholder_of_a_tensor_is_named() -> None:
    network = Net()
    captured = capture(network, (torch.randn(2, 1, 5, 5),))
    placeholders = {node.name: node for node in captured.graph.nodes if node.op == "placeholder"}
    inputs = placeholders.keys() - captured.tensors.keys()
    assert len(inputs) == 1
    tensors = named_tensors(network)
    assert set(captured.tensors.values()) == tensors.keys()
    for placeholder, name in captured.tensors.items():
        assert placeholders[placeholder].meta["val"].shape == tensors[name].shape


def test_keyword_inputs_are_captured() -> None:
    captured = capture(Net(), (torch.randn(2, 1, 5, 5),), {"scale": torch.randn(2, 1)})
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder" and n.name not in captured.tensors]
    assert [tuple(node.meta["val"].shape) for node in inputs] == [(2, 1, 5, 5), (2, 1)]


class Careful(nn.Module):
    """Some of its parts compute without autocast, one within the other, and with gradients on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.first(x).relu()
            with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                h = torch.sigmoid(h)
        y: Tensor = self.second(h)
        return y


def test_what_runs_under_autocast_is_part_of_the_graph() -> None:
    network, x = Careful().double(), torch.randn(2, 4, dtype=torch.float64)
    assert operators(network, x) == ["linear", "relu", "sigmoid", "linear"]
    with torch.no_grad():
        for tensor in (network.first.weight, network.first.bias):
            tensor[3:] = 0
    before = network(x)
    slim(network, {"first": torch.arange(6) < 3}, x, bias="fold")
    assert network.second.in_features == 3 and torch.allclose(network(x), before, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("error", [False, True])
def test_a_compiled_part_is_captured_as_written_and_stays_compiled(in_place: bool, error: bool) -> None:
    plain = nn.Sequential(Net(), nn.Linear(2, 3))
    network, graphs = copy.deepcopy(plain), []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    if in_place:
        network[0].compile(backend=backend)
    else:
        network[0] = torch.compile(network[0], backend=backend)
    x = torch.randn(2, 1, 5, 5)
    if error:
        with pytest.raises(CaptureError):
            capture(network, (x, x))
    else:
        assert operators(network, x) == operators(plain, x)
    assert not graphs
    torch.testing.assert_close(network.eval()(x), plain.eval()(x))
    assert graphs


def test_capturing_changes_nothing() -> None:
    network = Net()
    before, state = snapshot(network), torch.get_rng_state()
    modes = [module.training for module in network.modules()]
    capture(network, (torch.randn(2, 1, 5, 5, generator=torch.Generator()),))
    assert untouched(network, before)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_it_captures_what_eval_mode_does() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aux = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    assert operators(Auxiliary().train(), torch.randn(2, 3)) == ["linear"]


def test_control_flow_on_values_is_refused() -> None:
    class Branches(Net):
        def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
            return super().forward(x) if x.mean() > 0 else super().forward(-x)

    network = Branches()
    before, modes = snapshot(network), [module.training for module in network.modules()]
    with pytest.raises(CaptureError, match=r"Branches cannot be captured .*control flow that depends on values"):
        capture(network, (torch.randn(2, 1, 5, 5),))
    assert untouched(network, before)
    assert [module.training for module in network.modules()] == modes


def test_an_error_of_forward_is_passed_on_in_the_message() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such head")

    with pytest.raises(CaptureError, match="no such head") as caught:
        capture(Broken(), (torch.randn(2, 3),))
    assert caught.value.__cause__ is not None


def test_evaluating_restores_every_mode_also_after_an_error() -> None:
    network = Net()
    with pytest.raises(ZeroDivisionError), evaluating(network):
        assert not any(module.training for module in network.modules())
        raise ZeroDivisionError
    assert network.training and network.conv.training and not network.norm.training


def test_shared_tensors_are_named_once_by_their_first_name() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    network[1].weight = network[0].weight
    network[3].running_mean = network[2].running_mean
    names = named_tensors(network)
    assert "0.weight" in names and "1.weight" not in names
    assert "2.running_mean" in names and "3.running_mean" not in names
    assert len({id(tensor) for tensor in names.values()}) == len(names)


class Cache:
    """As the key–value cache of a language model: torch knows nothing of it."""

    def __init__(self, *tensors: Tensor) -> None:
        self.layers, self.length, self.again = [{"keys": tensor} for tensor in tensors], 3, self


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, known: Cache | None = None) -> dict[str, Any]:
        hidden = self.first(x).relu()
        remembered = self.second(hidden).relu()
        if known is not None:
            remembered = remembered + known.layers[0]["keys"]
        return {"logits": self.third(remembered), self.key: Cache(remembered)}

    key = "cache"


def test_tensors_in_objects_that_torch_does_not_know_are_outputs() -> None:
    network, x = Remembers(), torch.randn(3, 4)
    gates = {gate.name: gate.excluded for gate in find_gates(network, x)}
    assert gates["first"] is None and gates["second"] == "it is an output of the network"
    keep = torch.arange(6) > 2
    with torch.no_grad():
        network.first.weight[~keep] = network.first.bias[~keep] = 0
        before = network(x)
    slim(network, {"first": keep}, x)
    after = network(x)
    assert isinstance(after["cache"], Cache) and "forward" not in vars(network) and network.first.out_features == 3
    torch.testing.assert_close(after["logits"], before["logits"])
    torch.testing.assert_close(after["cache"].layers[0]["keys"], before["cache"].layers[0]["keys"])


def test_what_a_network_returns_to_be_given_back_to_it_is_no_result() -> None:
    network, x = Remembers(), torch.randn(3, 4)
    network.key = "known"
    gates = {gate.name: gate.excluded for gate in find_gates(network, x)}
    assert gates["second"] is None
    keep = torch.arange(5) > 1
    with torch.no_grad():
        network.second.weight[~keep] = network.second.bias[~keep] = 0
        before = network(x, known=network(x)["known"])
        slim(network, {"second": keep}, x)
        after = network(x, known=network(x)["known"])
    assert after["known"].layers[0]["keys"].shape == (3, 3)
    torch.testing.assert_close(after["logits"], before["logits"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: torch.jit.script(nn.ReLU()), "module '1' is TorchScript"),
        (lambda: nn.LazyLinear(4), "layer '1' is not initialised; run a batch"),
    ],
)
def test_a_part_that_cannot_be_captured_is_named(part, message):
    with pytest.raises(CaptureError, match=message):
        capture(nn.Sequential(nn.Linear(4, 4), part()), (torch.randn(3, 4),))
