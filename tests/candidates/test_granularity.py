from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import ScreeningPruningCallback, SlimmingPlan
from lightning_fscreen.candidates.channels import Channels
from lightning_fscreen.candidates.granularity import (
    GRANULARITIES,
    Granularity,
    Patterns,
    register_granularity,
    require_candidates,
)
from lightning_fscreen.candidates.units import Units
from lightning_fscreen.candidates.weights import Weights
from lightning_fscreen.members import Members
from lightning_fscreen.modules import select
from lightning_fscreen.statistics.collector import ActivationCollector
from tests.conftest import Classifier, ConvNet, digits, loader, mlp, trainer


@dataclass(frozen=True)
class Biased:
    name: str
    module: nn.Linear


class Biases(Granularity[Biased]):
    """The biases of linear layers: all that another granularity has to say."""

    noun = "biases"
    slims_in_fit = False

    def __init__(self, model: nn.Module, include: Patterns, exclude: Patterns) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.not_pruned = select(layers, include, exclude)
        self._layers = [Biased(name, module) for name, module in layers.items() if name not in self.not_pruned]
        require_candidates(self._layers, type(model).__name__, "linear layers", self.not_pruned)

    def slim(self, network: nn.Module, args: Any, kwargs: Any, kept: Any, *others: Any) -> SlimmingPlan:
        return SlimmingPlan()

    def collector(self, num_classes: int) -> ActivationCollector:
        raise AssertionError("magnitudes need no activations")

    def _members_of(self, layer: Biased) -> Members:
        return Members(layer.module.bias)


@pytest.fixture
def biases() -> Iterator[str]:
    register_granularity("bias")(Biases)
    yield "bias"
    del GRANULARITIES["bias"]


def test_another_granularity_needs_nothing_but_to_be_registered(biases: str) -> None:
    callback = ScreeningPruningCallback(granularity=biases, amount=0.5, criterion="magnitude", exclude="net.5")
    model = Classifier(mlp())
    run = trainer([callback])
    run.fit(model, loader())
    report = callback.report()
    assert report.granularity == biases and (report.total, report.kept) == (64, 32)
    assert sum(int((model.net[index].bias == 0).sum()) for index in (1, 3)) == 32
    assert run.callback_metrics["fscreen/sparsity"] == 0.5 and report.not_pruned.keys() == {"net.5"}


def test_arguments_of_other_granularities_are_refused(biases: str) -> None:
    with pytest.raises(ValueError, match="""bias='fold' is for granularity="unit" or "channel"; leave it out with"""):
        ScreeningPruningCallback(granularity=biases, bias="fold")


def test_names_are_registered_once() -> None:
    with pytest.raises(ValueError, match="'weight' is registered already"):
        register_granularity("weight")(Biases)
    assert {"unit": Units, "channel": Channels, "weight": Weights} == GRANULARITIES


def test_channels_learn_from_a_network_alone() -> None:
    """No Trainer, and names as in the model around the network."""
    model = Classifier(ConvNet())
    channels = Channels(model, None, None)
    channels.learn(model.net, (digits(2)[0],), {}, "net")
    assert channels.names == ["net.norm"]
    members = channels.members()["net.norm"]
    assert members.zeroed and members.weight is model.net.norm.weight and members.others == (model.net.norm.bias,)
    units = channels.units()
    assert units is not None and len(set(units["net.norm"].tolist())) == 8
    kept = torch.arange(8) < 5
    plan = channels.slim(model.net, (digits(2)[0],), {}, {"norm": kept})
    assert sum(plan.removed.values()) == 3 and model.net.norm.weight.shape == (5,)


def test_pruned_channels_output_their_mean() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    channels = Channels(network, None, None, bias="mean")
    assert not channels.members()["1"].zeroed
    pruned = torch.tensor([True, False, True, False])

    class Means:
        mean: Tensor = torch.tensor([1.0, 2.0, 3.0, 4.0])

    channels.after_pruning({"1": pruned}, {"1": Means()})  # type: ignore[dict-item]
    assert network[1].bias.tolist() == [1.0, 0.0, 3.0, 0.0]
