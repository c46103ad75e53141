"""A slim network is readable by a fresh full-size one, however it became slim, was trained and was saved."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_fscreen import ScreeningPruningCallback, load_from_checkpoint, load_slimmed, save_slimmed, slim
from lightning_fscreen.slimming import PlanError
from lightning_fscreen.slimming.carried import plan_of
from lightning_fscreen.slimming.state import PLAN_KEY
from tests.conftest import Classifier, loader, trainer
from tests.processes import run_ranks

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
KEEP = {"body.1.norm": torch.arange(6) > 1, "body.1.inner": torch.arange(4) < 3, "body.3": torch.arange(5) > 0}


class Block(nn.Module):
    """Pre-activation: the batch norm will select channels of the stream."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.inner, self.out = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False)

    def forward(self, x):
        return x + self.out(self.inner(self.conv(self.norm(x).relu())).relu())


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), Block(), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU()
        )
        self.fc = nn.Linear(5, classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Lit(Classifier):
    def __init__(self, path="a hyperparameter", net=None):
        super().__init__(net or Net(), lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.save_hyperparameters(ignore="net")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def fit(net, *callbacks, epochs=1, checkpoint=None):
    model = net if isinstance(net, Lit) else Lit(net=net)
    run = trainer(callbacks, max_epochs=epochs)
    run.fit(model, loader(count=64), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return run, model


def by_slim():
    net = Net()
    assert slim(net, KEEP, X).selects
    return net


def by_load_slimmed():
    return load_slimmed(Net(), by_slim().state_dict())


def in_a_fit():
    callback = ScreeningPruningCallback(amount=0.3, end_epoch=1)
    net = fit(Net(), callback, epochs=2)[1].net
    assert callback.plan
    return net


class SaveAt(pl.Callback):
    """Save at the start of an epoch."""

    def __init__(self, epoch, save):
        self.epoch, self.save = epoch, save

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.save(trainer, pl_module)


def without_callback(net, save):
    save(*fit(net))


def before_second_slimming(net, save):
    before = len(net.state_dict()), plan_of(net)
    fit(net, SaveAt(1, save), ScreeningPruningCallback(amount=0.3, end_epoch=2), epochs=3)
    assert before != (len(net.state_dict()), plan_of(net))


def after_second_slimming(net, save):
    before = plan_of(net)
    save(*fit(net, ScreeningPruningCallback(amount=0.3, end_epoch=1), epochs=2))
    assert plan_of(net) != before


def train_on(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for images, labels in loader(count=64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


def plain_loop(net, save):
    train_on(net)
    save(*with_trainer(net))


def with_trainer(net):
    run, model = trainer(), Lit(net=net)
    run.strategy.connect(model)
    return run, model


SLIM = (by_slim, by_load_slimmed, in_a_fit)
TRAIN = (without_callback, before_second_slimming, after_second_slimming, plain_loop)


def write_all(folder):
    """Every network, trained in every way and saved in every way, and its outputs."""
    for make in SLIM:
        net = make()
        for train in TRAIN:
            place = folder / make.__name__ / train.__name__
            place.mkdir(parents=True)

            def save(run, model, place=place, whole=train is not plain_loop):
                run.save_checkpoint(place / "lightning.ckpt", weights_only=not whole)
                torch.save(model.net.state_dict(), place / "state.pt")
                save_slimmed(model.net, place / "slimmed.safetensors")
                torch.save(copy.deepcopy(model.net).state_dict(), place / "copy.pt")
                torch.save(model.net.body.state_dict(), place / "body.pt")
                torch.save(copy.deepcopy(model.net).eval()(X), place / "outputs.pt")

            train(copy.deepcopy(net), save)


def check_all(folder):
    """In a new process: fresh full-size modules give the same bits, and train on."""
    for place in sorted(path.parent for path in folder.glob("*/*/outputs.pt")):
        expected = torch.load(place / "outputs.pt", weights_only=True)

        def read(name, place=place):
            return torch.load(place / name, weights_only=True)

        nets = {
            "checkpoint": load_from_checkpoint(Lit, place / "lightning.ckpt").net,
            "state_dict": load_slimmed(Net(), read("state.pt")),
            "save_slimmed": load_slimmed(Net(), place / "slimmed.safetensors"),
            "deepcopy": load_slimmed(Net(), read("copy.pt")),
        }
        for name, net in nets.items():
            assert torch.equal(net.eval()(X), expected), (place, name)
            train_on(net.train())
            assert not torch.equal(net.eval()(X), expected), (place, name)
        part = load_slimmed(Net().body, read("body.pt"))
        assert torch.equal(part.eval()(X), load_slimmed(Net(), read("state.pt")).body.eval()(X)), place
        resumed = load_from_checkpoint(Lit, place / "lightning.ckpt")
        if "loop" not in place.name:
            fit(resumed, epochs=3, checkpoint=place / "lightning.ckpt")


@pytest.mark.slow
def test_the_table_of_round_trips(tmp_path):
    write_all(tmp_path)
    run_ranks(1, check_all, tmp_path)
    assert len(list(tmp_path.glob("*/*/outputs.pt"))) == len(SLIM) * len(TRAIN)


@pytest.fixture(name="net", scope="module")
def slim_net():
    torch.manual_seed(0)
    return by_slim().eval()


def plans(state_dict):
    return [key.rpartition(".")[0] for key in state_dict if PLAN_KEY in key]


def test_whatever_surrounds_a_slim_network_carries_its_plan_once(net):
    assert plans(net.state_dict()) == plans(pickle.loads(pickle.dumps(net)).state_dict()) == [""]
    assert plans(Lit(net=net).state_dict()) == ["net"]
    assert plans(nn.Sequential(net, nn.Linear(10, 2)).state_dict()) == ["0"]
    assert plans(torch.compile(net).state_dict()) == ["_orig_mod"]
    assert plans(nn.ModuleDict({"a": net, "b": copy.deepcopy(net)}).state_dict()) == ["a", "b"]
    assert plans(net.body.state_dict()) == [""] and plans(net.body[1].state_dict()) == [""]
    assert not plans(net.fc.state_dict())


def test_a_wrapper_that_listens_takes_the_size_from_any_depth(net):
    for around in (lambda net: nn.Sequential(nn.Identity(), net), torch.compile, lambda net: Lit(net=net)):
        fresh = Net()
        load_slimmed(around(fresh), around(net).state_dict())
        assert torch.equal(fresh.eval()(X), net(X))


def test_slim_networks_take_dense_slim_and_other_slim_state_dicts(net):
    model, other = copy.deepcopy(net), Net()
    slim(other, {"body.3": torch.arange(5) > 1}, X)
    for source in (Net(), net, other, Net(), net):
        nn.Sequential(model).load_state_dict(nn.Sequential(source).state_dict())
        assert torch.equal(model.eval()(X), source.eval()(X)) and plan_of(model) == plan_of(source)
        assert bool(plans(model.state_dict())) == bool(plans(source.state_dict()))
    model.load_state_dict(net.state_dict(), assign=True)
    model.body.load_state_dict(net.body.state_dict())
    assert torch.equal(model(X), net(X))


def test_a_part_of_a_slim_network_does_not_change_its_size_alone(net):
    model, other = by_slim(), Net()
    slim(model, {"body.3": torch.arange(4) > 1}, X)
    slim(other, {"body.3": torch.arange(5) > 1}, X)
    with pytest.raises(PlanError, match="slimmed in another way"):
        model.body.load_state_dict(other.body.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.body.load_state_dict(Net().body.state_dict())


def test_averaged_and_converted_state_dicts_keep_their_plan(net):
    for change in (lambda value: 0.9 * value + 0.1 * value, torch.Tensor.half, torch.Tensor.bfloat16):
        state = {name: change(value) for name, value in net.state_dict().items()}
        assert plan_of(load_slimmed(Net(), state)).cuts == plan_of(net).cuts
    first = net.state_dict()
    first[PLAN_KEY].zero_()  # what code that writes into a state_dict does
    assert plans(net.state_dict()) and load_slimmed(Net(), net.state_dict())


@pytest.mark.parametrize("loading", ["load_state_dict", "Lightning's load_from_checkpoint", "predict"])
def test_a_network_that_does_not_listen_is_told_how_to_load(net, loading, tmp_path):
    run, model = with_trainer(net)
    run.save_checkpoint(tmp_path / "slim.ckpt", weights_only=True)
    with pytest.raises(RuntimeError) as caught:
        if loading == "load_state_dict":
            Lit().load_state_dict(model.state_dict())
        elif loading == "predict":
            trainer().predict(Lit(), loader(count=64), ckpt_path=tmp_path / "slim.ckpt", weights_only=True)
        else:
            Lit.load_from_checkpoint(tmp_path / "slim.ckpt", weights_only=True)
    first = str(caught.value).splitlines()[1].strip()
    assert first.startswith(f'Unexpected key(s) in state_dict: "net.{PLAN_KEY}"')
    assert "load it with load_from_checkpoint or load_slimmed from lightning_fscreen" in first


def test_the_wrong_function_names_the_right_one(net, tmp_path):
    run, _ = fit(copy.deepcopy(net))
    run.save_checkpoint(tmp_path / "a.ckpt")
    save_slimmed(net, tmp_path / "a.safetensors")
    with pytest.raises(PlanError, match=r"load_from_checkpoint\(MyModule, path\)"):
        load_slimmed(Net(), tmp_path / "a.ckpt")
    with pytest.raises(PlanError, match=r"load_from_checkpoint\(MyModule, path\)"):
        load_slimmed(Net(), torch.load(tmp_path / "a.ckpt", weights_only=True))
    with pytest.raises(PlanError, match=r"load_slimmed\(Lit\(…\), path\)"):
        load_from_checkpoint(Lit, tmp_path / "a.safetensors")


def test_hyperparameters_can_have_any_name(net, tmp_path):
    run, _ = fit(copy.deepcopy(net))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert load_from_checkpoint(Lit, tmp_path / "a.ckpt", path="mine").hparams == {"path": "mine"}
    assert isinstance(load_from_checkpoint(Lit, tmp_path / "a.ckpt"), pl.LightningModule)


# ---- another head


def test_a_slim_backbone_under_another_head(net, tmp_path, caplog):
    save_slimmed(net, tmp_path / "a.safetensors")
    fresh = Net(classes=3)
    head = fresh.fc.weight.detach().clone()
    for arguments in ({"exclude": "f*"}, {"strict": False}):
        loaded = load_slimmed(copy.deepcopy(fresh), tmp_path / "a.safetensors", **arguments)
        assert torch.equal(loaded.body.eval()(X), net.body(X)) and torch.equal(loaded.fc.weight, head[:, 1:])
    assert "fc.weight (shape (10, 4) in the file, (3, 4) here)" in caplog.text
    with pytest.raises(PlanError, match=r"'fc\.weight' of shape"):
        load_slimmed(fresh, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="head"):
        load_slimmed(fresh, tmp_path / "a.safetensors", exclude="head")


def test_a_head_that_reads_fewer_features_is_cut_with_them(tmp_path):
    net = Net()
    plan = slim(net, {"body.3": torch.tensor([True, False, True, True, False])}, X)
    save_slimmed(net, tmp_path / "a.safetensors")
    fresh = Net(classes=3)
    expected = fresh.fc.weight.detach()[:, [0, 2, 3]].clone()
    loaded = load_slimmed(fresh, tmp_path / "a.safetensors", exclude="fc")
    assert torch.equal(loaded.fc.weight, expected) and loaded(X).shape == (4, 3)
    small = Net()
    small.fc = nn.Linear(3, 2)
    assert load_slimmed(small, tmp_path / "a.safetensors", exclude="fc")(X).shape == (4, 2)
    save_slimmed(loaded, tmp_path / "b.safetensors")
    assert torch.equal(load_slimmed(Net(classes=3), tmp_path / "b.safetensors").eval()(X), loaded.eval()(X))
    odd = Net()
    odd.fc = nn.Linear(4, 2)
    with pytest.raises(PlanError, match=r"'fc\.weight' of shape \(2, 4\) is left out"):
        load_slimmed(odd, tmp_path / "a.safetensors", exclude="fc")
    assert plan.cuts["fc.weight"] == {1: (0, 2, 3)}


def test_a_head_that_was_replaced_is_read_back(tmp_path, caplog):
    net = Net()
    slim(net, {"body.3": torch.arange(5) > 1}, X)
    net.fc = nn.Linear(3, 7)
    net.body[1] = Block()  # another one, at full size
    save_slimmed(net.eval(), tmp_path / "a.safetensors")
    assert torch.equal(load_slimmed(Net(classes=7), tmp_path / "a.safetensors").eval()(X), net(X))
    assert torch.equal(load_slimmed(Net(classes=7), net.state_dict()).eval()(X), net(X))
    assert "replaced" not in caplog.text
    net.fc = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 7))
    save_slimmed(net, tmp_path / "b.safetensors")
    assert "fc: replaced or removed since" in caplog.text
    same = Net()
    same.fc = copy.deepcopy(net.fc)
    assert torch.equal(load_slimmed(same, tmp_path / "b.safetensors").eval()(X), net(X))


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    net = Net()
    slim(net, {"body.3": torch.arange(5) > 1}, X)
    net.fc.weight = nn.Parameter(torch.zeros(10, 2))
    with pytest.raises(PlanError, match="layer 'fc' cannot be saved"):
        save_slimmed(net, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
