"""Bad arguments of the callback, and data, models and trainers that it cannot work with."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.slimming import CaptureError
from tests.bad_inputs import Row, Untrained, World, by_name, check_refused, using, with_batches, with_model
from tests.conftest import Classifier, digits, mlp, trainer
from tests.fit.test_distributed import compressed
from tests.test_channel_fit import residual_net

FUSED = "lightning_fscreen.ranking.fused"


def third(x: Any, y: Any) -> bool:
    return bool(torch.equal(y, digits(64)[1][32:48]))


class Branches(nn.Module):
    """Its way depends on values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: Any) -> Any:
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(h if float(h.detach().sum()) > 0 else -h)


class NeverRuns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = mlp(), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.body(x)


def parts(world: World) -> None:
    class InParts(Untrained):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch[0]
            for layer in self.net:
                x = layer(x)
            return self.anchor.sum() * 0

    world.model = InParts(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)))
    world.before = world.state()
    world.fit()


def frozen() -> nn.Module:
    network = residual_net()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return network


def without_gates() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def fixed_gates() -> nn.Module:
    """What the batch norm puts out is the output of the network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))


def adafactor(world: World) -> None:
    world.model = Classifier(residual_net(), lambda parameters: torch.optim.Adafactor(parameters, lr=0.0))
    world.before = world.state()
    world.fit()


def optimizer(make: Callable[[Any], Any]) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.model.make_optimizer = make
        world.fit()

    return act


def zero_redundancy(parameters: Any) -> Any:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    return ZeroRedundancyOptimizer(parameters, lr=0.0)


class Other(SingleDeviceStrategy):
    pass


class SharedFake:
    """As much of a Trainer as is looked at before the strategy is refused."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.callbacks = strategy, []


TABLE: list[Row] = [
    ("amount of 1", using(amount=1.0), ValueError, "1.0", r"must lie in \[0, 1\)"),
    ("negative amount", using(amount=-0.1), ValueError, "amount .*-0.1", r"must lie in \[0, 1\)"),
    ("amount that is no number", using(amount=float("nan")), ValueError, "amount .*nan", r"must lie in \[0, 1\)"),
    ("unknown granularity", using(granularity="neuron"), ValueError, "granularity 'neuron'", "choose one of.*channel"),
    ("unknown criterion", using(criterion="f-score"), ValueError, "criterion 'f-score'", "choose one of.*screening"),
    ("no such function", using(criterion=f"{FUSED}:screenin"), ValueError, "criterion 'screenin'", "choose one of"),
    ("unknown schedule", using(schedule="cosine"), ValueError, "schedule 'cosine'", "choose one of.*cubic"),
    ("schedule of another type", using(schedule=3), TypeError, "schedule .*3", "callable"),
    ("schedule that never ends", using(schedule=lambda p: p / 2), ValueError, "returns 0.5", "must return 1"),
    ("unknown scope", using(scope="block"), ValueError, "scope 'block'", "choose one of.*'global', 'kind', 'layer'"),
    ("unknown connections", using(connections="all"), ValueError, "connections 'all'", "choose one of.*exact"),
    ("connections of channels", using(connections="exact"), ValueError, "connections='exact'", 'granularity="weight"'),
    ("unknown bias", using(bias="one"), ValueError, "bias 'one'", "choose one of.*fold"),
    ("bias of prune", using(bias="ridge"), ValueError, "bias 'ridge'", "choose one of.*fold"),
    ("criterion of prune", using(criterion="reconstruction"), ValueError, "='reconstruction'", "use another one"),
    ("bias of weights", using(granularity="weight", bias="fold"), ValueError, "bias='fold'", '"unit" or "channel"'),
    ("unknown feature", using(feature="max"), ValueError, "feature 'max'", "choose one of.*output_square"),
    ("feature of weights", using(granularity="weight", feature="output"), ValueError, "feature='output'", "channel"),
    ("unknown budget", using(budget="flops"), ValueError, "unknown budget 'flops'", "choose one of.*macs"),
    ("budget of weights", using(granularity="weight", budget="macs"), ValueError, "budget='macs'", 'leave .*"weight"'),
    (
        "budget beyond reach",
        using(budget="macs", amount=0.99),
        ValueError,
        "amount=0.99 of the cost",
        "lower amount to 0",
    ),
    ("feature without means", using(feature="output", bias="mean"), ValueError, "feature='output'", "another bias"),
    ("activation of outputs", using(criterion="activation", feature="output"), ValueError, "='output'", "needs feat"),
    ("screening_weight of 1.5", using(screening_weight=1.5), ValueError, "1.5", r"must lie in \[0, 1\]"),
    ("negative min_channels", using(min_channels=-1), ValueError, "min_channels.*-1", "at least 0"),
    ("min_channels beyond the budget", using(min_channels=8), ValueError, "at least 8", "lower amount or the floor"),
    ("collect_every of 0", using(collect_every=0), ValueError, "collect_every.*0", "at least 1"),
    ("collect_every in words", using(collect_every="always"), ValueError, "every .*'always'", '"auto" or a num'),
    ("collect_epochs of 0", using(collect_epochs=0), ValueError, "collect_epochs.*0", "at least 1"),
    ("half an epoch", using(end_epoch=1.5), ValueError, "end_epoch .*1.5", "must be a whole number"),
    ("half a step", using(start_step=1.5), ValueError, "start_step .*1.5", "must be a whole number"),
    ("no start", using(start_epoch=None), ValueError, "start_epoch .*None", "must be a whole number"),
    ("classes as text", using(num_classes="3"), ValueError, "num_classes .*'3'", "must be a whole number"),
    ("λ as text", using(screening_weight="all"), ValueError, "screening_weight .*'all'", "must be a number"),
    ("a pattern that is none", using(include=[3]), ValueError, r"include .*\[3\]", "glob pattern"),
    ("a flag as text", using(slim="false"), ValueError, "slim .*'false'", "must be True or False"),
    ("labels by their name", using(labels="digit"), ValueError, "labels .*'digit'", "must be a function of the batch"),
    ("a function as criterion", using(criterion=abs), ValueError, "criterion <built-in", "register your own"),
    ("one class", using(num_classes=1), ValueError, "num_classes.*1", "at least 2"),
    ("negative start_epoch", using(start_epoch=-1), ValueError, "start_epoch.*-1", "at least 0"),
    ("empty window", using(start_epoch=2), ValueError, "end_epoch .*2", "must lie after start_epoch"),
    ("end_epoch after the end", using(end_epoch=9), ValueError, "end_epoch=9", "lower end_epoch or train longer"),
    (
        "training without an end",
        lambda world: world.fit({"max_epochs": -1}, end_epoch=None),
        ValueError,
        "max_epochs",
        "end_epoch= .*must be given",
    ),
    ("include without a match", using(include="encoder.*"), ValueError, r"include='encoder\.\*'", "the layers are"),
    ("exclude of everything", using(exclude="*"), ValueError, "nothing to prune in Untrained", "Check include="),
    ("no labels", with_batches(lambda x, y: [x]), ValueError, r"batch 0.*\(16, 1, 8, 8\)", "Pass labels="),
    (
        "labels that are text",
        with_batches(lambda x, y: (x, "seven")),
        ValueError,
        "tuple of 2|list of 2",
        "Pass labels=",
    ),
    (
        "labels out of range",
        with_batches(lambda x, y: (x, y), num_classes=5),
        ValueError,
        r"batch 0 of epoch 0: labels must lie in 0 … 4, found 9",
        "pass num_classes=",
    ),
    ("negative labels", with_batches(lambda x, y: (x, y - 1)), ValueError, "found -1", "-100, or leave them out"),
    (
        "float labels",
        with_batches(lambda x, y: (x, y.float())),
        ValueError,
        "batch 0.*float32",
        "num_classes=2",
    ),
    (
        "too few labels",
        using(labels=lambda batch: batch[1][:5]),
        ValueError,
        "layer 'net.2.norm1' ran on 16 instances, but the batch has 5 labels",
        "pass labels= a function",
    ),
    (
        "an empty loader",
        lambda world: trainer([ScreeningPruningCallback()]).fit(world.model, DataLoader([])),
        ValueError,
        "training dataloader is empty",
        "check the data set",
    ),
    (
        "NaN in the data",
        with_batches(lambda x, y: (torch.full_like(x, torch.nan) if third(x, y) else x, y)),
        ValueError,
        "NaN or inf.*'net.2.norm1'.*batch 2",
        "Check the data for NaN",
    ),
    (
        "inf in the data",
        with_batches(lambda x, y: (torch.full_like(x, torch.inf) if third(x, y) else x, y), granularity="weight"),
        ValueError,
        "NaN or inf.*'net.1'.*batch 2",
        "Check the data for NaN",
    ),
    (
        "an included layer that never runs",
        with_model(NeverRuns, granularity="weight", num_classes=10, include=["net.body*", "net.spare"]),
        ValueError,
        "'net.spare'.* cannot be ranked: it was not called",
        r"exclude=\['net.spare'\]",
    ),
    (
        "no batch norm",
        with_model(without_gates),
        ValueError,
        "nothing to prune.*no batch norms",
        'granularity="channel" prunes batch norms, "unit"',
    ),
    ("frozen batch norms", with_model(frozen), ValueError, "net.2.norm1: frozen", "requires_grad"),
    (
        "batch norms that cannot be pruned",
        with_model(fixed_gates),
        ValueError,
        "nothing to prune.*\n.*net.2: it is an output of the network",
        'granularity="channel" prunes batch norms, "unit"',
    ),
    (
        "a network that cannot be captured",
        with_model(Branches),
        CaptureError,
        "Branches cannot be captured",
        "control flow that depends on values",
    ),
    ("a network that is called in parts", parts, ValueError, "module 'net' was not called", r"self\.net\(x\)"),
    (
        "Adafactor",
        adafactor,
        NotImplementedError,
        "Adafactor.*'net",
        "slim=False",
    ),
    (
        "ZeroRedundancyOptimizer",
        optimizer(zero_redundancy),
        NotImplementedError,
        "ZeroRedundancyOptimizer",
        "use the optimizer",
    ),
    (
        "another strategy",
        lambda world: world.fit({"strategy": Other(device="cpu"), "accelerator": "auto"}),
        NotImplementedError,
        "Other",
        "strategy='ddp'",
    ),
    (
        "FSDP",
        lambda world: ScreeningPruningCallback().setup(SharedFake(FSDPStrategy()), world.model, "fit"),
        NotImplementedError,
        "FSDPStrategy",
        "strategy='ddp'",
    ),
    (
        "spawned processes",
        lambda world: ScreeningPruningCallback().setup(trainer(strategy="ddp_spawn", devices=2), world.model, "fit"),
        NotImplementedError,
        "ddp_spawn",
        "strategy='ddp'",
    ),
    (
        "a communication hook with a state",
        lambda world: ScreeningPruningCallback().setup(SharedFake(compressed()), world.model, "fit"),
        NotImplementedError,
        "powerSGD_hook.*PowerSGDState",
        "fp16_compress_hook",
    ),
    (
        "weights that are products with masks",
        lambda world: world.fit(callbacks=(ModelPruning("l1_unstructured", amount=0.1),)),
        NotImplementedError,
        "ModelPruning",
        'criterion="magnitude"',
    ),
    (
        "averaged weights",
        lambda world: world.fit(callbacks=(StochasticWeightAveraging(1e-2),)),
        NotImplementedError,
        "StochasticWeightAveraging",
        "use WeightAveraging or EMAWeightAveraging",
    ),
]


@by_name(TABLE)
def test_bad_input_gets_an_error_that_helps_and_changes_nothing(row, tmp_path):
    check_refused(row, tmp_path)
