from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

import lightning_fscreen.saving.slimmed as checkpoint
from lightning_fscreen import load_slimmed, save_slimmed, slim
from lightning_fscreen.saving.slimmed import digest
from lightning_fscreen.slimming import PlanError, SlimmingPlan, remove_dead_units
from lightning_fscreen.slimming.carried import plan_of
from tests.slimming import outputs, snapshot, untouched, zero_columns, zero_rows

EXAMPLE = (2, 3, 8, 8)


class Net(nn.Module):
    """Everything at once: norms, depthwise, tied weights, a layer that will need a bias, buffers of all kinds."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.point = nn.Conv2d(8, 6, 1, bias=False)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head = nn.Linear(6, classes)
        self.register_buffer("scale", torch.rand(6) + 0.5)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(self.depthwise(self.norm(self.stem(x)).sigmoid()))
        h = self.a(h.relu().mean((2, 3))).relu()
        return self.head(self.b(h).relu() * self.scale)


class Model(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.net = Net(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def slimmed(*, whole: bool = False, times: int = 1) -> Model:
    torch.manual_seed(0)
    model = Model().eval()
    net = model.net
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.weight[[0, 5]] = 0
    zero_columns(net.point, 1, 2)
    zero_rows(net.stem, 6)
    zero_columns(net.head, 3)
    zero_columns(net.a, 3)
    target: nn.Module = model if whole else net
    assert remove_dead_units(target, (torch.randn(EXAMPLE),)).biases
    if times == 2:
        zero_columns(net.point, 0)
        assert remove_dead_units(target, (torch.randn(EXAMPLE),))
    return model


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_the_model_used_here_shrinks_everywhere() -> None:
    net = slimmed().net
    assert net.depthwise.groups == net.depthwise.in_channels == net.stem.out_channels == net.norm.num_features == 3
    assert net.point.bias is not None and net.a.weight is net.b.weight
    assert net.head.in_features == len(net.scale) == 5


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_a_fresh_model_becomes_the_saved_one(tmp_path: Path, whole: bool, times: int) -> None:
    model = slimmed(whole=whole, times=times)
    save_slimmed(model, tmp_path / "model.safetensors")
    fresh = Model().eval()
    assert load_slimmed(fresh, tmp_path / "model.safetensors") is fresh
    x = torch.randn(5, 3, 9, 7)
    assert torch.equal(model(x), fresh(x))
    assert same_bits(model, fresh)
    assert fresh.net.a.weight is fresh.net.b.weight
    assert repr(fresh) == repr(model)
    assert all(p.requires_grad and p.is_leaf for p in fresh.parameters())
    assert plan_of(fresh).cuts == plan_of(model).cuts


def test_a_submodule_that_was_slimmed_can_be_saved_alone(tmp_path: Path) -> None:
    model = slimmed()
    save_slimmed(model.net, tmp_path / "net.safetensors")
    fresh = load_slimmed(Net(), str(tmp_path / "net.safetensors"))
    assert same_bits(model.net, fresh)
    with pytest.raises(PlanError, match="Model does not have"):
        load_slimmed(Model(), tmp_path / "net.safetensors")


def test_a_part_of_a_network_that_was_slimmed_as_a_whole_can_be_saved_alone(tmp_path: Path) -> None:
    model = slimmed(whole=True)
    save_slimmed(model.net, tmp_path / "net.safetensors")
    assert same_bits(model.net, load_slimmed(Net(), tmp_path / "net.safetensors"))


def test_what_was_loaded_can_be_saved_and_slimmed_again(tmp_path: Path) -> None:
    save_slimmed(slimmed(), tmp_path / "1.safetensors")
    again = load_slimmed(Model(), tmp_path / "1.safetensors").eval()
    zero_columns(again.net.point, 0)
    assert remove_dead_units(again.net, (torch.randn(EXAMPLE),))
    save_slimmed(again, tmp_path / "2.safetensors")
    assert same_bits(again, load_slimmed(Model(), tmp_path / "2.safetensors"))


def test_a_model_that_was_not_slimmed_is_saved_as_it_is(tmp_path: Path) -> None:
    model = Model()
    save_slimmed(model, tmp_path / "model.safetensors")
    fresh = load_slimmed(Model(), tmp_path / "model.safetensors")
    assert same_bits(model, fresh) and not plan_of(fresh)


def test_buffers_that_are_not_saved_are_cut_on_loading(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)
            self.register_buffer("scale", torch.arange(1.0, 6.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu() * self.scale)

    model = Scaled()
    zero_columns(model.fc2, 1)
    remove_dead_units(model, (torch.randn(2, 3),))
    assert model.scale.tolist() == [1, 3, 4, 5]
    save_slimmed(model, tmp_path / "model.safetensors")
    fresh = load_slimmed(Scaled(), tmp_path / "model.safetensors")
    x = torch.randn(4, 3)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = slimmed().to(dtype)
    save_slimmed(model, tmp_path / "model.safetensors")
    fresh = load_slimmed(Model().to(dtype), tmp_path / "model.safetensors")
    assert same_bits(model, fresh)
    assert {p.dtype for p in fresh.parameters()} == {dtype} and fresh.net.table.dtype == torch.int64


def test_a_model_of_another_dtype_keeps_its_own(tmp_path: Path) -> None:
    model = slimmed().to(torch.bfloat16)
    save_slimmed(model, tmp_path / "model.safetensors")
    fresh = load_slimmed(Model().double(), tmp_path / "model.safetensors")
    assert {p.dtype for p in fresh.parameters()} == {torch.float64}
    assert same_bits(model.double(), fresh)


def test_flags_modes_and_hooks_of_the_fresh_model_stay(tmp_path: Path) -> None:
    save_slimmed(slimmed(), tmp_path / "model.safetensors")
    fresh = Model()
    fresh.net.stem.weight.requires_grad_(False)
    fresh.net.norm.eval()
    calls: list[int] = []
    fresh.net.head.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    load_slimmed(fresh, tmp_path / "model.safetensors")
    assert not fresh.net.stem.weight.requires_grad and fresh.net.head.weight.requires_grad
    assert fresh.training and not fresh.net.norm.training
    assert calls == []
    fresh(torch.randn(EXAMPLE))
    assert calls == [5]


def test_layers_slimmed_twice_where_the_added_bias_shrinks(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 2))

    model = build()
    zero_rows(model[0], 0, 1)
    remove_dead_units(model, (torch.randn(2, 3),))
    zero_columns(model[4], 2)
    remove_dead_units(model, (torch.randn(2, 3),))
    save_slimmed(model, tmp_path / "model.safetensors")
    assert same_bits(model, load_slimmed(build(), tmp_path / "model.safetensors"))


# ---- what does not fit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model(classes=7), r"net\.head.*shape"),
        (Net, "Net does not have"),
        (lambda: nn.Sequential(nn.Linear(3, 4)), "Sequential does not have"),
        (slimmed, "fresh, full-size"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(tmp_path: Path, make: Any, message: str) -> None:
    save_slimmed(slimmed(), tmp_path / "model.safetensors")
    other = make()
    before, text = snapshot(other), repr(other)
    with pytest.raises(PlanError, match=message):
        load_slimmed(other, tmp_path / "model.safetensors")
    assert untouched(other, before) and repr(other) == text


def test_a_model_with_more_or_fewer_tensors_is_refused(tmp_path: Path) -> None:
    save_slimmed(slimmed(), tmp_path / "model.safetensors")
    more, fewer = Model(), Model()
    more.aux = nn.Linear(2, 2)
    del fewer.net.table
    for other, name in ((more, "aux.bias"), (fewer, "net.table")):
        before = snapshot(other)
        with pytest.raises(PlanError, match=f"'{name}'"):
            load_slimmed(other, tmp_path / "model.safetensors")
        assert untouched(other, before)


def damaged(path: Path, **plan: Any) -> Path:
    """The saved file with some fields of its plan replaced."""
    data = json.loads(plan_of(slimmed()).to_json()) | plan
    text, tensors = json.dumps(data), load_file(path)
    save_file(tensors, path, metadata={"fscreen_plan": text, "fscreen_sha256": digest(text, tensors)})
    return path


@pytest.mark.parametrize(
    "plan",
    [
        {"cuts": {}},
        {"cuts": {"net.stem.weight": {"0": [-1, 0, 1]}}},
        {"cuts": {"net.stem.weight": {"0": [0, 0, 1]}}},
        {"cuts": {"net.stem.weight": {"0": [0, 1, 99]}}},
        {"cuts": {"net.stem.weight": {"0": [2, 1, 0]}}},
        {"cuts": {"net.nothing": {"0": [0]}}},
        {"cuts": {"net.stem.weight": None}},
        {"shapes": {}},
        {"shapes": {"net.stem.weight": [1, 2]}},
        {"groups": {}},
        {"groups": {"net.depthwise": 0}},
        {"groups": {"net.depthwise": 2}},
        {"groups": {"net.nothing": 3}},
        {"biases": []},
        {"biases": ["net.head"]},
        {"biases": ["net"]},
        {"biases": ["net.point", "net.stem"]},
        {"format": 0},
        {"pinned": None},
    ],
)
def test_a_damaged_plan_is_refused_and_the_model_left_as_it_was(tmp_path: Path, plan: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_slimmed(slimmed(), path)
    damaged(path, **plan)
    fresh = Model()
    before, text = snapshot(fresh), repr(fresh)
    with pytest.raises(PlanError):
        load_slimmed(fresh, path)
    assert untouched(fresh, before) and repr(fresh) == text


def test_no_truncated_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_slimmed(slimmed(), path)
    data = path.read_bytes()
    fresh = Model()
    before = snapshot(fresh)
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(PlanError, match=r"model\.safetensors"):
            load_slimmed(fresh, path)
    assert untouched(fresh, before)


@pytest.mark.parametrize("kind", ["random", "text", "zip pickle", "old pickle", "longer"])
def test_other_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    save_slimmed(slimmed(), path)
    if kind == "random":
        path.write_bytes(torch.randint(0, 256, (5000,), dtype=torch.uint8).numpy().tobytes())
    elif kind == "text":
        path.write_text("not a model " * 50)
    elif kind == "zip pickle":
        torch.save(Model().state_dict(), path)
    elif kind == "old pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        path.write_bytes(path.read_bytes() + b"tail")
    fresh = Model()
    before = snapshot(fresh)
    with pytest.raises(PlanError, match=r"model\.safetensors"):
        load_slimmed(fresh, path)
    assert untouched(fresh, before)


def test_safetensors_of_somebody_else_are_told_apart(tmp_path: Path) -> None:
    save_file({"net.head.weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(PlanError, match="no slimming plan"):
        load_slimmed(Model(), tmp_path / "plain.safetensors")


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_slimmed(Model(), tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        save_slimmed(Model(), tmp_path / "absent" / "model.safetensors")
    with pytest.raises(OSError, match=str(tmp_path)):
        load_slimmed(Model(), tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError):
        save_slimmed(Model(), tmp_path / "folder.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.safetensors"]


# ---- writing


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_an_interrupted_save_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_slimmed(slimmed(), path)
    previous = path.read_bytes()

    def half(tensors: Any, partial: Any, metadata: Any) -> None:
        Path(partial).write_bytes(b"half")
        raise OSError("disk full")

    def refuse(source: Any, target: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if failing == "save_file":
            patch.setattr(checkpoint, "save_file", half)
        else:
            patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="disk full"):
            save_slimmed(Model(), path)
    assert path.read_bytes() == previous
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_saving_replaces_and_leaves_only_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("something else")
    model = slimmed()
    before = snapshot(model)
    save_slimmed(model, path)
    assert untouched(model, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    assert same_bits(model, load_slimmed(Model(), path))


def test_tensors_that_are_views_of_one_storage_can_be_saved(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.register_buffer("first", self.fc.weight.detach()[:2])

    model = Views()
    save_slimmed(model, tmp_path / "model.safetensors")
    assert same_bits(model, load_slimmed(Views(), tmp_path / "model.safetensors"))


def test_the_file_holds_shared_tensors_once_and_the_plan_as_text(tmp_path: Path) -> None:
    model = slimmed()
    save_slimmed(model, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "net.a.weight" in tensors and "net.b.weight" not in tensors
    assert "net.point.bias" in tensors
    with checkpoint.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        plan = SlimmingPlan.from_json(json.loads(file.metadata()["fscreen"])["plan"])
    assert plan == plan_of(model)


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    """The order of several keys of metadata would be one of chance."""
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for path in files:
        save_slimmed(slimmed(), path)
    assert len({path.read_bytes() for path in files}) == 1


def test_files_of_the_version_before_load(tmp_path: Path) -> None:
    model, path = slimmed(), tmp_path / "model.safetensors"
    save_slimmed(model, path)
    assert same_bits(model, load_slimmed(Model(), damaged(path)))  # rewritten with two keys, and nothing else changed


def test_copies_of_a_slimmed_model_are_saved_with_their_plan(tmp_path: Path) -> None:
    model = slimmed()
    twin = copy.deepcopy(model)
    save_slimmed(twin, tmp_path / "model.safetensors")
    fresh = load_slimmed(Model(), tmp_path / "model.safetensors")
    x = torch.randn(EXAMPLE)
    assert torch.equal(outputs(fresh, x)[0], outputs(model, x)[0])


def test_a_layer_that_was_fused_with_its_batch_norm_is_loaded_into_one_that_was(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()

    def fused(network: nn.Sequential) -> nn.Sequential:
        network[0], network[1] = fuse_conv_bn_eval(network[0], network[1]), nn.Identity()
        return network

    network, x = make(), torch.randn(EXAMPLE)
    slim(network, {"1": torch.arange(8) < 5}, x)
    fused(network)
    save_slimmed(network, tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", network.state_dict()):
        assert torch.equal(load_slimmed(fused(make()), source)(x), network(x))


def test_a_state_dict_without_a_plan_says_so(tmp_path: Path) -> None:
    network = slimmed()
    save_slimmed(network, tmp_path / "model.safetensors")
    bare = {name: tensor for name, tensor in network.state_dict().items() if "fscreen_plan" not in name}
    with pytest.raises(PlanError, match="there is no slimming plan"):
        load_slimmed(Model(), bare)
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match="load_file"):
        load_slimmed(Model(), tmp_path / "other.safetensors")


def test_names_that_data_parallel_has_put_a_prefix_before() -> None:
    network = slimmed()
    saved = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    assert same_bits(network, load_slimmed(Model(), saved))


def test_what_is_no_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a module, an instance.*Model"):
        load_slimmed(Model, tmp_path / "model.safetensors")  # type: ignore[type-var]
