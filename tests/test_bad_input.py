"""A table of bad inputs: each gets an error that names the culprit and a remedy, and leaves everything as it was."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_fscreen import (
    FStatistic,
    ScreeningPruningCallback,
    find_gates,
    functional,
    load_slimmed,
    save_slimmed,
    screen,
    slim,
)
from lightning_fscreen.saving.slimmed import digest
from lightning_fscreen.slimming import CaptureError, PlanError
from lightning_fscreen.slimming.carried import plan_of
from tests.conftest import Classifier, digits, loader, mlp, trainer
from tests.fit.test_distributed import compressed
from tests.test_channel_fit import residual_net

FUSED = "lightning_fscreen.ranking.fused"
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Untrained(Classifier):
    """Whatever the batches are, training changes nothing, so that all changes are the callback's."""

    def __init__(self, net: nn.Module, make_optimizer: Any = None) -> None:
        super().__init__(net, make_optimizer)
        self.anchor = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self(batch[0])
        return self.anchor.sum() * 0


@dataclass
class World:
    """A model, and a folder with the file of a slim one, `slim.safetensors`."""

    folder: Path
    model: Untrained = field(default_factory=lambda: Untrained(residual_net()))
    changed: Callable[[Any, Any], Any] = lambda x, y: (x, y)

    @property
    def file(self) -> Path:
        return self.folder / "slim.safetensors"

    @property
    def net(self) -> nn.Module:
        return self.model.net

    def batches(self) -> Any:
        images, labels = digits(64)
        return DataLoader(
            [self.changed(images[i : i + 16].clone(), labels[i : i + 16].clone()) for i in range(0, 64, 16)],
            batch_size=None,
        )

    def fit(
        self, trainer_options: dict[str, Any] | None = None, callbacks: tuple[Any, ...] = (), **arguments: Any
    ) -> None:
        callback = ScreeningPruningCallback(**{"amount": 0.5, "end_epoch": 2, **arguments})
        self.run = trainer([callback, *callbacks], **(trainer_options or {}))
        self.run.fit(self.model, self.batches())

    def damaged(self, **plan: Any) -> Path:
        """The file with some fields of its plan replaced."""
        network = load_slimmed(residual_net(), self.file)
        path = self.folder / "damaged.safetensors"
        text = json.dumps(json.loads(plan_of(network).to_json()) | plan)
        tensors = load_file(self.file)
        save_file(tensors, path, metadata={"fscreen_plan": text, "fscreen_sha256": digest(text, tensors)})
        return path

    def state(self) -> Any:
        modules = dict(self.model.named_modules())
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks")
        parameters = [p.detach().clone() for p in self.model.parameters()]
        kinds = [(name, type(module).__name__, module.training) for name, module in modules.items()]
        counts = [len(getattr(module, hook)) for module in modules.values() for hook in hooks]
        flags = [parameter.requires_grad for parameter in self.model.parameters()]
        buffers = [(name, buffer.shape) for name, buffer in self.model.named_buffers()]
        files = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        return parameters, kinds, counts, flags, buffers, files


def using(**changes: Any) -> Callable[[World], None]:
    """A fit with other arguments of the callback."""
    return lambda world: world.fit(**changes)


def with_batches(change: Callable[[Any, Any], Any], **arguments: Any) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.changed = change
        world.fit(**arguments)

    return act


def with_model(make: Callable[[], nn.Module], **arguments: Any) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.model.net = make()
        world.before = world.state()
        world.fit(**arguments)

    return act


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


def truncated(world: World) -> None:
    path = world.folder / "half.safetensors"
    path.write_bytes(world.file.read_bytes()[:-100])
    world.before = world.state()
    load_slimmed(world.net, path)


def pickled(world: World) -> None:
    path = world.folder / "pickle.safetensors"
    torch.save(world.net.state_dict(), path)
    world.before = world.state()
    load_slimmed(world.net, path)


def foreign(world: World) -> None:
    path = world.folder / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    world.before = world.state()
    load_slimmed(world.net, path)


def cuts(**indices: Any) -> Callable[[World], None]:
    def act(world: World) -> None:
        path = world.damaged(**indices)
        world.before = world.state()
        load_slimmed(world.net, path)

    return act


def slim_twice(world: World) -> None:
    load_slimmed(world.net, world.file)
    world.before = world.state()
    load_slimmed(world.net, world.file)


def keep(**masks: Any) -> Callable[[World], None]:
    return lambda world: slim(world.net, {name.replace("_", "."): mask for name, mask in masks.items()}, X)


def on_damaged_state_dict(world: World) -> None:
    state = world.model.state_dict() | {"net.fscreen_plan": torch.zeros(3, dtype=torch.uint8)}
    run = trainer([ScreeningPruningCallback()])
    torch.save({"state_dict": state, "pytorch-lightning_version": pl.__version__}, world.folder / "bad.ckpt")
    world.before = world.state()
    run.predict(world.model, world.batches(), ckpt_path=world.folder / "bad.ckpt", weights_only=True)


SCORES = torch.ones(8, dtype=torch.bool)
TABLE: list[tuple[str, Callable[[World], Any], type[Exception], str, str]] = [
    # what, how, error, the culprit in the message, the remedy in the message
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
    ("bias of weights", using(granularity="weight", bias="fold"), ValueError, "bias='fold'", '"unit" or "channel"'),
    ("unknown feature", using(feature="max"), ValueError, "feature 'max'", "choose one of.*output_square"),
    ("feature of weights", using(granularity="weight", feature="output"), ValueError, "feature='output'", "channel"),
    ("feature without means", using(feature="output", bias="mean"), ValueError, "feature='output'", "another bias"),
    ("activation of outputs", using(criterion="activation", feature="output"), ValueError, "='output'", "needs feat"),
    ("screening_weight of 1.5", using(screening_weight=1.5), ValueError, "1.5", r"must lie in \[0, 1\]"),
    ("negative min_channels", using(min_channels=-1), ValueError, "min_channels.*-1", "at least 0"),
    ("min_channels beyond the budget", using(min_channels=8), ValueError, "at least 8", "lower amount or the floor"),
    ("collect_every of 0", using(collect_every=0), ValueError, "collect_every.*0", "at least 1"),
    ("collect_every in words", using(collect_every="always"), ValueError, "every .*'always'", '"auto" or a num'),
    ("collect_epochs of 0", using(collect_epochs=0), ValueError, "collect_epochs.*0", "at least 1"),
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
        "averaged weights",
        lambda world: world.fit(callbacks=(StochasticWeightAveraging(1e-2),)),
        NotImplementedError,
        "StochasticWeightAveraging",
        "use WeightAveraging or EMAWeightAveraging",
    ),
    ("a mask for no batch norm", keep(conv1=SCORES), ValueError, "'conv1'", "they are"),
    ("a mask of another length", keep(**{"2.norm1": SCORES[:5]}), ValueError, r"'2.norm1'.*\(5,\)", r"shape \(8,\)"),
    ("a mask of numbers", keep(**{"2.norm1": torch.ones(8)}), ValueError, "'2.norm1'.*float32", "bool tensor"),
    ("a list as a mask", keep(**{"2.norm1": [True] * 8}), ValueError, "'2.norm1'.*list", "bool tensor"),
    ("a mask that keeps nothing", keep(**{"2.norm1": ~SCORES}), ValueError, "'2.norm1'.*none of 8", "at least one"),
    (
        "slim with another bias",
        lambda world: slim(world.net, {}, X, "mean"),
        ValueError,
        "bias 'mean'",
        "choose one of",
    ),
    (
        "inputs that do not fit",
        lambda world: find_gates(world.net, torch.zeros(2, 3, 8, 8)),
        CaptureError,
        "Sequential cannot be captured",
        "usual causes|expected input",
    ),
    ("no such file", lambda w: load_slimmed(w.net, w.folder / "nothing"), FileNotFoundError, "nothing", "no file"),
    ("a folder as a file", lambda w: load_slimmed(w.net, w.folder), FileNotFoundError, "test_", "no file"),
    ("no such folder", lambda w: save_slimmed(w.net, w.folder / "a" / "b"), FileNotFoundError, "/a'", "does not exist"),
    ("a truncated file", truncated, PlanError, "half.safetensors", "not a whole safetensors file"),
    ("a pickle with another name", pickled, PlanError, "pickle.safetensors", "load_from_checkpoint"),
    ("a file of somebody else", foreign, PlanError, "foreign.safetensors", "not written by save_slimmed"),
    (
        "a file of another model",
        lambda w: load_slimmed(mlp(), w.file),
        PlanError,
        "'[0-9]",
        "another model|does not have",
    ),
    ("a model that is slim already", slim_twice, PlanError, r"'2\.|'1\.", "fresh, full-size instance"),
    (
        "a negative index",
        cuts(cuts={"4.weight": {"0": [-1, 0]}}),
        PlanError,
        "4.weight",
        "index -1|not have shape|shape",
    ),
    ("a repeated index", cuts(cuts={"4.weight": {"0": [0, 0]}}), PlanError, "4.weight", "repeated|shape"),
    ("an index out of range", cuts(cuts={"4.weight": {"0": [0, 99]}}), PlanError, "4.weight", "index 99|shape"),
    ("a plan of a later version", cuts(format=99), PlanError, "format 99", "this version reads"),
    ("a damaged plan in a checkpoint", on_damaged_state_dict, PlanError, "slimming plan", "not a slimming plan"),
    (
        "features without a batch",
        lambda w: functional.f_statistic(torch.zeros(3), torch.zeros(3).long(), 2),
        ValueError,
        r"\(3,\)",
        r"\(N, ",
    ),
    (
        "labels beyond num_classes",
        lambda w: FStatistic(2, 2).update(torch.zeros(3, 2), torch.tensor([0, 1, 2])),
        ValueError,
        "found 2",
        "num_classes=",
    ),
    (
        "another number of features",
        lambda w: FStatistic(2, 2).update(torch.zeros(3, 4), torch.zeros(3).long()),
        ValueError,
        "4",
        r"2",
    ),
    (
        "an empty screening",
        lambda w: screen(w.net, DataLoader([]), num_classes=10),
        ValueError,
        "no batch|empty",
        "data",
    ),
    ("unknown probes", lambda w: screen(w.net, loader(), num_classes=1), ValueError, "num_classes.*1", "at least 2"),
]


class SharedFake:
    """As much of a Trainer as is looked at before the strategy is refused."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.callbacks = strategy, []


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.fixture(scope="module")
def slim_file(tmp_path_factory):
    network, path = residual_net(), tmp_path_factory.mktemp("slim") / "slim.safetensors"
    slim(network, {"2.norm1": torch.arange(8) < 5, "3.norm2": torch.arange(16) > 3}, X)
    save_slimmed(network, path)
    return path


@pytest.mark.parametrize(
    ("act", "error", "culprit", "remedy"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_bad_input_gets_an_error_that_helps_and_changes_nothing(act, error, culprit, remedy, slim_file, tmp_path):
    shutil.copy(slim_file, tmp_path)
    world = World(tmp_path)
    world.before = world.state()
    with pytest.raises(error, match=f"(?s){culprit}") as caught:
        act(world)
    assert caught.match(f"(?s){remedy}")
    assert same(world.before, world.state())
    for made in getattr(getattr(world, "run", None), "optimizers", []):
        listed = {id(p) for group in made.param_groups for p in group["params"]}
        assert listed == set(map(id, world.model.parameters()))
        assert not made._optimizer_step_post_hooks


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40 and len({row[0] for row in TABLE}) == len(TABLE)
