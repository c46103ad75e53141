"""A model that bad inputs meet, and what is asked of each: the error helps, and everything is as it was."""

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_fscreen import (
    ScreeningPruningCallback,
    load_slimmed,
    save_slimmed,
    slim,
)
from lightning_fscreen.saving.slimmed import digest
from lightning_fscreen.slimming.carried import plan_of
from tests.conftest import Classifier, digits, trainer
from tests.test_channel_fit import residual_net

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


Row = tuple[str, Callable[[World], Any], type[Exception], str, str]
"""What, how, the error, the culprit in its message, the remedy in its message."""


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def by_name(table: list[Row]) -> pytest.MarkDecorator:
    """One test for every row."""
    assert len({row[0] for row in table}) == len(table)
    return pytest.mark.parametrize("row", table, ids=[row[0] for row in table])


def check_refused(row: Row, folder: Path) -> None:
    """It ends with that error, which says what is wrong and what to do, and changes nothing."""
    _, act, error, culprit, remedy = row
    (folder / "slim.safetensors").write_bytes(slim_file())
    world = World(folder)
    world.before = world.state()
    with pytest.raises(error, match=f"(?s){culprit}") as caught:
        act(world)
    assert caught.match(f"(?s){remedy}")
    assert same(world.before, world.state())
    for made in getattr(getattr(world, "run", None), "optimizers", []):
        listed = {id(p) for group in made.param_groups for p in group["params"]}
        assert listed == set(map(id, world.model.parameters()))
        assert not made._optimizer_step_post_hooks


@functools.cache
def slim_file() -> bytes:
    """The file of a slim network."""
    with torch.random.fork_rng():
        network = residual_net()
    slim(network, {"2.norm1": torch.arange(8) < 5, "3.norm2": torch.arange(16) > 3}, X)
    with tempfile.TemporaryDirectory() as folder:
        save_slimmed(network, Path(folder) / "slim.safetensors")
        return (Path(folder) / "slim.safetensors").read_bytes()
