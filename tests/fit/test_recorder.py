from __future__ import annotations

import signal
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen.fit.recorder import InputRecorder, common_parent


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


def recorder(network: nn.Module | None = None) -> InputRecorder:
    made = InputRecorder([("net", network if network is not None else Anything())])
    made.start()
    return made


def test_the_first_inputs_are_remembered_cut_and_copied() -> None:
    made = recorder()
    x, mask, scalar, table = torch.randn(7, 3), torch.ones(7, dtype=torch.bool), torch.tensor(2.0), torch.randn(4, 4)
    made.network(x, {"mask": mask, "table": table}, flag=True, scale=scalar, more=[x])
    made.network(torch.zeros(9, 3))
    assert made.inputs is not None
    args, kwargs = made.inputs
    assert torch.equal(args[0], x[:2]) and torch.equal(args[1]["mask"], mask[:2])
    assert torch.equal(args[1]["table"], table)
    assert kwargs["flag"] is True and torch.equal(kwargs["scale"], scalar) and torch.equal(kwargs["more"][0], x[:2])
    assert made.instances == 2
    before = args[0].clone()
    x.zero_()
    assert torch.equal(args[0], before) and not args[0].requires_grad


def test_keyword_inputs_alone() -> None:
    made = recorder()
    made.network(batch={"x": torch.randn(5, 3)})
    assert made.inputs is not None and made.inputs[0] == ()
    assert made.inputs[1]["batch"]["x"].shape == (2, 3)


@pytest.mark.parametrize(("size", "instances"), [(1, 1), (2, 2), (5, 2)])
def test_instances_are_counted(size: int, instances: int) -> None:
    made = recorder()
    made.network(torch.randn(size, 3))
    assert made.instances == instances
    assert made.inputs is not None and made.inputs[0][0].shape == (instances, 3)


def test_gradients_are_not_kept() -> None:
    made = recorder()
    x = torch.randn(3, 3, requires_grad=True)
    made.network(x * 2)
    assert made.inputs is not None and made.inputs[0][0].grad_fn is None


def test_inputs_without_tensors() -> None:
    made = recorder()
    made.network("text", 3)
    assert made.inputs == (("text", 3), {}) and made.instances == 1


def test_watching_starts_once_and_stops() -> None:
    network = Anything()
    made = recorder(network)
    made.start()
    assert len(network._forward_pre_hooks) == 1
    made.stop()
    made.stop()
    assert len(network._forward_pre_hooks) == 0
    network(torch.randn(2, 3))
    assert made.inputs is None
    made.start()
    network(torch.randn(2, 3))
    assert made.inputs is not None


def test_inputs_follow_the_network_to_its_device() -> None:
    made = recorder()
    made.network(torch.randn(2, 3), flag=1, index=torch.tensor([1, 2]))
    made.network.to("meta")
    args, kwargs = made.inputs_on_device()
    assert args[0].device.type == kwargs["index"].device.type == "meta" and kwargs["flag"] == 1


def test_description() -> None:
    assert InputRecorder([("net.body", Lit())]).describe() == "module 'net.body'"
    assert InputRecorder([("", Lit())]).describe() == "Lit.forward"
