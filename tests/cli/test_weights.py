"""`weights=FILE`: whatever way trained weights were saved, a run begins with them."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_fscreen import save_slimmed, slim
from lightning_fscreen.cli.explaining import explain_run
from lightning_fscreen.cli.run import run
from lightning_fscreen.cli.weights import load_weights
from lightning_fscreen.slimming.plan import PlanError
from tests.cli.test_run import QUIET, composed
from tests.conftest import Classifier, mlp


class Whole(Classifier):
    """A module that is its own network."""

    def __init__(self):
        super().__init__(None)
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)


def trained(seed=0):
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)))


def same(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


SAVED = {
    "state_dict": lambda model, path: torch.save(model.net.state_dict(), path),
    "of the module": lambda model, path: torch.save(model.state_dict(), path),
    "a checkpoint": lambda model, path: torch.save({"epoch": 3, "state_dict": model.state_dict()}, path),
    "DataParallel": lambda model, path: torch.save(nn.DataParallel(model.net).state_dict(), path),
    "compiled": lambda model, path: torch.save(torch.compile(model.net).state_dict(), path),
    "safetensors": lambda model, path: save_file(model.net.state_dict(), path),
    "save_slimmed": lambda model, path: save_slimmed(model.net, path),
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_weights_are_loaded_whatever_way_they_were_saved(save, tmp_path):
    model, fresh = trained(), trained(seed=1)
    save(model, tmp_path / "weights")
    load_weights(fresh, str(tmp_path / "weights"))
    assert same(fresh, model)


def test_names_that_begin_like_the_place_of_the_network_are_its_own(tmp_path):
    nested = [Classifier(Classifier(mlp())) for _ in range(2)]
    for state in nested[0].net.state_dict(), nested[0].state_dict():
        torch.save(state, tmp_path / "weights.pt")
        fresh = copy.deepcopy(nested[1])
        load_weights(fresh, str(tmp_path / "weights.pt"))
        assert same(fresh, nested[0])


def test_a_module_that_is_its_own_network_is_loaded_whole(tmp_path):
    model, fresh = Whole(), Whole()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.ckpt")
    load_weights(fresh, str(tmp_path / "weights.ckpt"))
    assert same(fresh, model)


@pytest.mark.parametrize("whole_module", [True, False])
def test_slim_weights_make_the_network_slim(whole_module, tmp_path):
    model, fresh = trained(), trained(seed=1)
    slim(model.net, {"2": torch.arange(8) < 5}, torch.randn(2, 64))
    torch.save((model if whole_module else model.net).state_dict(), tmp_path / "weights.pt")
    load_weights(fresh, str(tmp_path / "weights.pt"))
    assert fresh.net[1].out_features == 5 and same(fresh, model)


def test_a_new_head_begins_with_weights_of_its_own(tmp_path):
    model, fresh = trained(), trained(seed=1)
    fresh.net[4] = nn.Linear(8, 3)
    own = fresh.net[4].weight.detach().clone()
    torch.save(model.net.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(PlanError, match=r"'4\.weight' has shape \(10, 8\)|'4\.bias' has shape"):
        load_weights(fresh, str(tmp_path / "weights.pt"))
    load_weights(fresh, str(tmp_path / "weights.pt"), exclude="4")
    assert torch.equal(fresh.net[4].weight, own) and torch.equal(fresh.net[1].weight, model.net[1].weight)


BAD = {
    "a pickled module": (lambda path: torch.save(nn.Linear(2, 2), path), "loaded safely"),
    "text": (lambda path: path.write_text("weights"), "loaded safely"),
    "half a file": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "loaded safely"),
    "a list": (lambda path: torch.save([torch.zeros(2)], path), "no state_dict but list"),
    "an optimizer": (lambda path: torch.save({"state": {}, "param_groups": []}, path), "no state_dict but .*'state'"),
    "another network": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "no tensor '1.bias'"),
    "none": (lambda path: None, "there is no file"),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_files_that_hold_no_such_weights_say_so_and_change_nothing(write, message, tmp_path):
    model, before = trained(), trained()
    write(tmp_path / "weights")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_weights(model, str(tmp_path / "weights"))
    assert same(model, before)


def test_a_run_begins_where_another_ended(tmp_path):
    still = ["trainer.max_epochs=1", "model.optimizer.lr=0", "callbacks.fscreen.amount=0.01"]
    run(composed(*QUIET, "trainer.max_epochs=8", f"paths.output_dir={tmp_path}/first"))
    weights = f"weights={tmp_path}/first/model.safetensors"
    run(composed(*QUIET, weights, *still, f"paths.output_dir={tmp_path}/second"))
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second"))
    assert first["test_error"] < 0.2 and second["test_error"] == pytest.approx(first["test_error"], abs=0.02)
    assert second["params"]["before"] == first["params"]["after"]


def test_what_pruning_would_do_is_explained_for_these_weights(tmp_path, capsys):
    unit = ["experiment=digits_unit", "extras.figures=false"]
    run(composed(*unit, *QUIET, "callbacks=none", f"paths.output_dir={tmp_path}/first"))
    weights = f"weights={tmp_path}/first/model.safetensors"
    own = explain_run(composed(*unit, weights, f"paths.output_dir={tmp_path}/second"))
    assert f"with the weights of {tmp_path}" in capsys.readouterr().out
    assert own.to_dict() != explain_run(composed(*unit, f"paths.output_dir={tmp_path}/third")).to_dict()
