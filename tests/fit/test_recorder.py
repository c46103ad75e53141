from __future__ import annotations

import copy
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen.fit.networks import Network, examining
from lightning_fscreen.fit.recorder import Recorder, common_parent


class Lit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        self.heads = nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})])
        self.network = nn.Linear(2, 2)
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("names", "parent"),
    [
        (["net.0", "net.1.0"], "net"),
        (["net.1.0", "net.1.1"], "net.1"),
        (["net.0", "fc"], ""),
        (["net.0", "network"], ""),  # a common prefix of letters is none of modules
        (["heads.0", "heads.1.a"], ""),
        (["heads.1.a", "heads.1.b"], ""),
        (["fc"], "fc"),
        (["net.1.0"], "net.1.0"),
        (["net.1.0", "net.1.0"], "net.1.0"),
        (["heads.1.a"], "heads.1.a"),
        (["net", "net.0"], "net"),
        ([], ""),
    ],
)
def test_common_parent(names: list[str], parent: str) -> None:
    assert common_parent(Lit(), names) == parent


def test_a_root_that_is_a_list_is_its_own_parent() -> None:
    class Stack(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
            return x

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("common_parent does not come back")

    model = Stack([nn.Linear(2, 2), nn.Linear(2, 2)])
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        assert common_parent(model, ["0", "1"]) == ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, *args: object, **kwargs: object) -> int:
        return 0


def recorded(*args: Any, **kwargs: Any) -> Network:
    network = Network("net", Anything())
    network.record(args, kwargs)
    return network


def test_inputs_are_remembered_cut_and_copied() -> None:
    x, mask, scalar, table = torch.randn(7, 3), torch.ones(7, dtype=torch.bool), torch.tensor(2.0), torch.randn(4, 4)
    network = recorded(x, {"mask": mask, "table": table}, flag=True, scale=scalar, more=[x * 2])
    assert network.inputs is not None
    args, kwargs = network.inputs
    assert torch.equal(args[0], x[:2]) and torch.equal(args[1]["mask"], mask[:2])
    assert torch.equal(args[1]["table"], table)
    assert kwargs["flag"] is True and torch.equal(kwargs["scale"], scalar) and torch.equal(kwargs["more"][0], 2 * x[:2])
    assert network.instances == 2
    before = args[0].clone()
    x.zero_()
    assert torch.equal(args[0], before)


def test_keyword_inputs_alone() -> None:
    network = recorded(batch={"x": torch.randn(5, 3, requires_grad=True) * 2})
    assert network.inputs is not None and network.inputs[0] == ()
    assert network.inputs[1]["batch"]["x"].shape == (2, 3) and network.inputs[1]["batch"]["x"].grad_fn is None


@pytest.mark.parametrize(("size", "instances"), [(1, 1), (2, 2), (5, 2)])
def test_instances_are_counted(size: int, instances: int) -> None:
    network = recorded(torch.randn(size, 3))
    assert network.instances == instances
    assert network.inputs is not None and network.inputs[0][0].shape == (instances, 3)


def test_inputs_without_tensors() -> None:
    network = recorded("text", 3)
    assert network.inputs == (("text", 3), {}) and network.instances == 1
    assert network.state_dict()["inputs"] == (("text", 3), {}) and recorded({1: 2}).state_dict()["inputs"] is None


def test_inputs_follow_the_network_to_its_device() -> None:
    network = recorded(torch.randn(2, 3), flag=1, index=torch.tensor([1, 2]))
    network.module.to("meta")
    args, kwargs = network.inputs_on_device()
    assert args[0].device.type == kwargs["index"].device.type == "meta" and kwargs["flag"] == 1


class Model(nn.Module):
    """Layers named `norm` are those to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Pair(), nn.ModuleDict({"c": Pair(), "d": Pair()})
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b["c"](self.a(x))  # type: ignore[no-any-return]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))  # type: ignore[no-any-return]


NORMS = ["a.norm", "b.c.norm", "b.d.norm", "norm"]


@pytest.mark.parametrize(
    ("calls", "found", "unreached"),
    [
        ([""], {""}, []),
        (["a", "b.c", "a"], {"a", "b.c"}, ["b.d.norm", "norm"]),
        (["", "b.c", ""], {"a", "b.c"}, ["b.d.norm", "norm"]),
        (["b.c", ""], {"a", "b.c"}, ["b.d.norm", "norm"]),
        (["a", "norm"], {"a"}, ["b.c.norm", "b.d.norm", "norm"]),
    ],
    ids=["whole", "parts", "whole-and-part", "part-and-whole", "single-layer"],
)
def test_networks_are_the_outermost_modules_that_are_called(
    calls: list[str], found: set[str], unreached: list[str]
) -> None:
    model = Model()
    recorder, seen = Recorder(model, NORMS), []
    recorder.start(lambda network: seen.append(network.name))
    for name in calls:
        model.get_submodule(name)(torch.randn(4, 2))
    assert set(recorder.networks) == found <= set(seen) and list(recorder.unreached) == unreached
    recorder.stop()
    recorder.stop()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_shared_parameters_make_one_network_of_neither() -> None:
    model = Model()
    model.b["c"].inner[0].weight = model.a.inner[0].weight
    recorder = Recorder(model, NORMS)
    recorder.start()
    for name in ("a", "b.c"):
        model.get_submodule(name)(torch.randn(4, 2))
    assert not recorder.networks and not recorder.is_ready
    assert recorder.unreached["a.norm"] == "module 'a' shares parameters with module 'b.c'"


def test_a_network_that_is_rejected_gives_way_to_those_inside() -> None:
    model = Model()
    recorder = Recorder(model, NORMS)
    recorder.start(lambda network: recorder.reject("", "it cannot be captured") if not network.name else None)
    model(torch.randn(4, 2))
    assert list(recorder.networks) == ["a", "b.c"] and recorder.unreached["norm"] == "it cannot be captured"


def test_the_innermost_of_equals() -> None:
    outer = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    for innermost, name in ((True, "0.0"), (False, "")):
        recorder = Recorder(outer, ["0.0.0", "0.0.1"], innermost)
        recorder.start()
        outer(torch.randn(3, 2))
        assert list(recorder.networks) == [name] and recorder.is_complete
        recorder.stop()


@pytest.mark.parametrize("called", [True, False])
def test_a_model_whose_forward_is_called_by_name_is_a_network_too(called: bool) -> None:
    model, seen = Model(), []
    recorder = Recorder(model, NORMS)
    recorder.start(lambda network: seen.append(network.name))
    x = torch.randn(4, 2)
    outputs = [model(x) if called else model.forward(x) for _ in range(2)]
    assert seen == [""] and list(recorder.networks) == [""] and recorder.is_complete
    args, _ = recorder.networks[""].inputs or ((), {})
    assert torch.equal(args[0], x[:2])
    recorder.stop()
    assert "forward" not in vars(model) and torch.equal(outputs[0], model(x))


def test_a_forward_of_somebody_else_stays() -> None:
    model = Model()
    model.forward = forward = lambda x: x  # type: ignore[method-assign]
    recorder = Recorder(model, NORMS)
    recorder.start()
    assert model.forward is forward
    recorder.stop()
    assert vars(model)["forward"] is forward


def test_a_copy_has_a_forward_of_its_own_and_is_not_watched() -> None:
    model, x = Model(), torch.randn(4, 2)
    recorder = Recorder(model, NORMS)
    recorder.start()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied.forward(x).any() and not copied(x).any() and not recorder.networks
    other = Recorder(copied, NORMS)
    other.start()
    copied.forward(x)
    assert list(other.networks) == [""] and not recorder.networks
    other.stop()
    assert "forward" not in vars(copied)
    assert model.forward(x).any() and list(recorder.networks) == [""]
    recorder.stop()


def test_a_network_under_a_transform_is_not_called() -> None:
    model = Model().eval()
    recorder = Recorder(model, NORMS)
    recorder.start()
    torch.func.vmap(torch.func.jacrev(lambda x: model.a(x[None])), randomness="same")(torch.randn(4, 2))
    assert not recorder.networks
    recorder.stop()


def test_what_is_not_trained_is_no_network() -> None:
    model = Model()
    recorder = Recorder(model, NORMS)
    recorder.optimizers = [torch.optim.SGD(model.a.parameters(), 0.1)]
    recorder.start()
    model.b["c"](torch.randn(4, 2))
    model.a(torch.randn(4, 2))
    assert list(recorder.networks) == ["a"] and recorder.is_untrained("b.c.norm") and not recorder.is_untrained("norm")
    assert recorder.unreached["b.c.norm"] == "none of the parameters of module 'b.c' is in an optimizer"


def test_description() -> None:
    assert Recorder(Lit(), ["net.0", "net.1.0"]).describe() == "module 'net'"
    assert Recorder(Lit(), ["net.0", "fc"]).describe() == Recorder(Lit(), ["fc"]).describe() == "Lit.forward"


def test_examined_networks_do_not_log() -> None:
    class Logs(pl.LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            self.log_dict({"x": x.sum()})
            return x

    model = nn.Sequential(Logs())
    with examining(model, torch.randn(2)):
        model(torch.randn(2))
    assert "log" not in vars(model[0])
