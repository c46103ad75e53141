"""Inputs of layers that read a stream beside batch norms, against columns of zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import find_gates, load_slimmed, save_slimmed, slim
from lightning_fscreen.models import densenet40, resnet20
from tests.slimming.masked import randomize
from tests.test_channel_fit import post_net, residual_net

KINDS = ["channel", "neuron", "head", "input"]


class Wide(nn.Module):
    """A stream that a linear layer, a convolution of one position, and two batch norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.BatchNorm1d(12)
        self.inner, self.direct, self.out = nn.Linear(12, 12, bias=False), nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) → (N, 5)."""
        x = self.stem(x)
        x = x + self.inner(torch.relu(self.left(x)))
        return torch.relu(self.direct(x)) + self.out(torch.relu(self.right(x)))


def names(net: nn.Module, x: Tensor) -> list[str]:
    return [gate.name for gate in find_gates(net, x, KINDS) if gate.kind == "input"]


def test_who_reads_a_stream() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert names(resnet20(), images) == ["blocks.3.shortcut.inputs", "blocks.6.shortcut.inputs"]
    assert names(Wide(), torch.randn(2, 6)) == ["direct.inputs"]
    assert names(densenet40(), images) == names(post_net(), torch.randn(2, 1, 8, 8)) == []  # none beside batch norms
    assert not [gate for gate in find_gates(resnet20(), images) if gate.kind == "input"]  # unless asked for


@pytest.mark.parametrize(("net", "shape"), [(resnet20, (2, 3, 8, 8)), (Wide, (4, 6)), (residual_net, (3, 1, 8, 8))])
def test_whole_channels_of_a_stream_and_single_readers_go_exactly(
    net: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path
) -> None:
    torch.manual_seed(0)
    network, x = net().double(), torch.randn(shape, dtype=torch.float64)
    randomize(network)
    generator = torch.Generator().manual_seed(0)
    gates = [gate for gate in find_gates(network, x, KINDS) if gate.excluded is None]
    for share in (0.3, 1.0):  # of the channels, all readers go
        whole = torch.rand(64, generator=generator) < 0.4
        keep, masked, own = {}, copy.deepcopy(network), copy.deepcopy(network)
        for gate in gates:
            gone = whole[: gate.channels] & (torch.rand(gate.channels, generator=generator) < share)
            gone[0] = False
            module = masked.get_submodule(gate.projection or gate.name)
            keep[gate.name] = ~gone
            with torch.no_grad():
                if gate.kind == "input":
                    module.weight[:, gone] = 0
                else:
                    module.weight[gone] = 0
                    if module.bias is not None:
                        module.bias[gone] = 0
        plan = slim(own, keep, x)
        assert not plan.kept_for
        for training in (False, True):
            torch.testing.assert_close(own.train(training)(x), masked.train(training)(x), rtol=0, atol=1e-9)
        save_slimmed(own, tmp_path / "slim.safetensors")
        again = load_slimmed(net().double(), tmp_path / "slim.safetensors")
        torch.testing.assert_close(again.eval()(x), own.eval()(x), rtol=0, atol=0)
    if net is not residual_net:
        width = len(network.get_submodule("stem").weight)
        assert len(own.get_submodule("stem").weight) == width - int(whole[1:width].sum())
