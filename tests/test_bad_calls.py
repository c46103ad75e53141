"""Bad masks, inputs, files and features."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file
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
from lightning_fscreen.slimming import CaptureError, PlanError
from tests.bad_inputs import Row, World, X, by_name, check_refused
from tests.conftest import loader, mlp, trainer


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
TABLE: list[Row] = [
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


@by_name(TABLE)
def test_bad_input_gets_an_error_that_helps_and_changes_nothing(row, tmp_path):
    check_refused(row, tmp_path)
