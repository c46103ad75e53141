"""A trained network made smaller in one call, against the same network with constants in the place of what went."""

import copy

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen import explain, load_slimmed, prune, save_slimmed
from lightning_fscreen.fit.decision import Decision
from lightning_fscreen.slimming import CaptureError, VerificationError
from tests.conftest import digits, loader
from tests.test_channel_fit import OPTIMIZERS, residual_net
from tests.test_cost_fit import count, wide_net
from tests.test_unit_fit import Attentive, convnext, mixed_net, plain_net, sigmoid_net


def trained(net, steps=30, seed=0):
    torch.manual_seed(seed)
    network, (images, labels) = net(), digits()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps):
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


@pytest.fixture
def masks(monkeypatch):
    """The masks that the last call has decided on."""
    found, decide = {}, Decision.new_masks

    def remember(self, fraction, seed):
        kept = decide(self, fraction, seed)
        found.clear()
        found.update(kept)
        return kept

    monkeypatch.setattr(Decision, "new_masks", remember)
    return found


NETS = [wide_net, residual_net, mixed_net, plain_net, sigmoid_net, convnext]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_it_computes_what_the_masked_network_does(net, bias, masks):
    network = trained(net)
    dense, (images, _) = copy.deepcopy(network), digits()
    plan, report = prune(network, loader(), 0.4, bias=bias, min_channels=2, streams=True, progress=False)
    assert plan and report.after.macs == count(network, "macs") < report.before.macs == count(dense, "macs")
    assert report.after.params == sum(p.numel() for p in network.parameters())
    assert not network.training and not network._forward_pre_hooks
    assert {layer.name: layer.kept for layer in report.layers} == {name: int(own.sum()) for name, own in masks.items()}
    with torch.no_grad():
        for name, kept in masks.items():
            module = dense.get_submodule(name.removesuffix(".inputs"))
            if name.endswith(".inputs"):
                module.weight[:, ~kept] = 0
                continue
            module.weight[~kept] = 0
            if bias == "zero":
                module.bias[~kept] = 0
        torch.testing.assert_close(network(images), dense(images), rtol=1e-3, atol=1e-4)


def test_the_mean_activation_stands_in_for_what_is_gone(masks):
    """Means over instances and positions, behind the activation functions, of the network before anything is pruned."""
    network, (images, _) = trained(mixed_net), digits()
    dense = copy.deepcopy(network)
    prune(network, loader(), 0.4, bias="mean", progress=False)
    with torch.no_grad():
        channels, units = dense[:3](images), dense[:7](images)
        channels[:, ~masks["1"]] = channels.mean((0, 2, 3))[~masks["1"], None, None]
        hidden = torch.where(masks["5"], dense[3:7](channels), units.mean(0))
        torch.testing.assert_close(network(images), dense[7](hidden), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", ["params", "macs", "candidates"])
def test_again_and_again_with_training_between(budget, tmp_path):
    network, (images, labels) = trained(wide_net), digits()
    optimizer = OPTIMIZERS["adamw"](network.parameters())
    before = count(network, "macs") if budget == "macs" else sum(p.numel() for p in network.parameters())
    for _ in range(3):
        _, report = prune(network, loader(), 0.2, budget=budget, optimizers=optimizer, progress=False)
        F.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        network.eval()
    if budget == "candidates":
        assert report.pruned_fraction == pytest.approx(0.2, abs=0.01)
    else:
        assert count(network, budget) / before == pytest.approx(0.8**3, abs=0.02)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], network.parameters(), strict=True))
    save_slimmed(network, tmp_path / "slim.safetensors")
    fresh = wide_net().eval()
    load_slimmed(fresh, tmp_path / "slim.safetensors")
    assert torch.equal(fresh(images), network(images))


def test_heads_are_pruned_with_all_that_makes_them(masks):
    torch.manual_seed(0)
    network = Attentive().eval()
    _, report = prune(network, loader(), 0.3, progress=False)
    assert {layer.name: layer.kept for layer in report.layers} == {name: int(own.sum()) for name, own in masks.items()}
    assert report.after.macs == count(network, "macs") == pytest.approx(0.7 * report.before.macs, rel=0.05)


def test_one_pass_and_none_where_weights_say_all():
    class Counted:
        passes = batches = 0

        def __iter__(self):
            self.passes += 1
            for batch in loader():
                self.batches += 1
                yield batch

    for options, batches in (({}, 4), ({"criterion": "magnitude", "bias": "zero"}, 1)):
        data = Counted()
        prune(trained(wide_net), data, 0.3, progress=False, **options)
        assert (data.passes, data.batches) == (1, batches)


class Named(nn.Module):
    """Takes a dict, and has a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.net, self.unused = plain_net(), nn.Linear(4, 4)

    def forward(self, image):
        return {"logits": self.net(image)}


def test_batches_of_other_forms():
    images, labels = digits()
    batches = [{"image": images, "label": labels, "index": torch.arange(len(images))}]
    network = trained(plain_net)
    wrapped = Named()
    wrapped.net.load_state_dict(network.state_dict())
    options = {"num_classes": 10, "bias": "mean", "progress": False}
    _, report = prune(wrapped, batches, 0.3, forward=lambda model, batch: model(image=batch["image"]), **options)
    assert "does not use it" in report.not_pruned["unused"]
    prune(network, loader(), 0.3, bias="mean", progress=False)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), wrapped.net.parameters(), strict=True))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain_net()

    def forward(self, x):
        return self.net(x if float(x.mean()) > -1 else -x)


def refuse(*_):
    raise VerificationError("they differ")


EMPTY = DataLoader(TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amount": 1.5}, ValueError, r"amount .* \[0, 1\), got 1.5"),
        ({"amount": 0.9, "min_channels": 9}, ValueError, "amount=0.9 of the cost cannot go.*lower amount to"),
        ({"granularity": "weight", "budget": "candidates", "bias": "zero"}, ValueError, '"unit" or "channel".*weight'),
        ({"criterion": "taylor"}, ValueError, "'taylor' needs gradients"),
        ({"include": "nothing"}, ValueError, "include='nothing' matches no layer"),
        ({"dataloader": EMPTY}, ValueError, "the dataloader is empty"),
        ({"criterion": "screening", "labels": lambda batch: batch[1] * 100}, ValueError, "label"),
        ({"forward": lambda model, batch: batch}, ValueError, "forward= does not call the Sequential"),
        ({"optimizers": torch.optim.SGD([torch.zeros(1)])}, ValueError, "optimizer"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(options, error, message):
    network = trained(plain_net)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(error, match=message):
        prune(network, **{"dataloader": loader(), "amount": 0.4, "progress": False, **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("bias", ["zero", "mean", "ridge"])
def test_nothing_changes_where_slimming_fails(bias, monkeypatch):
    network = trained(wide_net)
    before = copy.deepcopy(network.state_dict())
    monkeypatch.setattr("lightning_fscreen.slimming.apply.Verification.check", refuse)
    with pytest.raises(VerificationError):
        prune(network, loader(), 0.4, bias=bias, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(CaptureError):
        prune(Branching(), loader(), 0.4, progress=False)


def test_an_empty_first_batch_changes_nothing():
    one, other = trained(plain_net), trained(plain_net)
    empty = (torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64))
    prune(one, loader(), 0.4, progress=False)
    prune(other, [empty, *loader()], 0.4, progress=False)
    state = one.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_the_default_needs_no_labels():
    """Nor a class: units are ranked by what the others can replace."""
    images, _ = digits(64)
    pruned = []
    for batches in (
        images.split(16),
        [(part,) for part in images.split(16)],
        [(part, part) for part in images.split(16)],
    ):
        network = trained(plain_net)
        prune(network, batches, 0.5, progress=False)
        pruned.append(network)
    assert count(pruned[0], "macs") <= 0.51 * count(plain_net(), "macs")
    for other in pruned[1:]:
        assert all(torch.equal(p, q) for p, q in zip(pruned[0].parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("instances", [16, 64])
def test_few_instances_are_warned_of(instances, caplog):
    images, labels = digits()
    prune(plain_net(), [(images[:instances], labels[:instances])], 0.3, progress=False)
    assert (f"{instances} instances are few" in caplog.text) is (instances < 64)


def test_inputs_that_are_no_numbers_change_nothing():
    network, batches = trained(mixed_net), [(torch.full((4, 1, 8, 8), torch.nan), torch.arange(4))]
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="NaN or inf"):
        prune(network, batches, 0.5, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_network_that_draws_noise_is_pruned_and_random_numbers_are_as_before():
    class Sampling(nn.Module):
        """A variational autoencoder."""

        def __init__(self):
            super().__init__()
            self.encoder, self.mean, self.deviation = nn.Linear(64, 24), nn.Linear(24, 4), nn.Linear(24, 4)
            self.decoder, self.last = nn.Linear(4, 24), nn.Linear(24, 64)

        def forward(self, images):
            hidden = self.encoder(images.flatten(1)).relu()
            mean, deviation = self.mean(hidden), self.deviation(hidden)
            drawn = mean + torch.randn_like(mean) * deviation.exp()
            return self.last(self.decoder(drawn).relu()), mean, deviation

    network = Sampling()
    numbers = torch.get_rng_state()
    _, report = prune(network, [digits(64)[0]], 0.5, progress=False)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert report.after.macs == pytest.approx(0.5 * report.before.macs, rel=0.03)


def test_inputs_of_which_no_part_can_be_taken_are_used_whole():
    """Nodes of a graph, whose edges name them by their numbers."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = nn.Linear(8, 24), nn.Linear(24, 3)

        def forward(self, nodes, edges):
            neighbours = nodes.new_zeros(len(nodes), len(nodes))
            neighbours[edges[1], edges[0]] = 1.0
            return self.last((neighbours @ self.hidden(nodes)).relu())

    torch.manual_seed(0)
    edges = torch.stack([torch.arange(20), torch.arange(20).roll(1)])
    batches = [{"nodes": torch.randn(20, 8), "edges": edges} for _ in range(4)]
    network = Graph()
    found = explain(network, dataloader=batches, progress=False)
    plan, report = prune(network, batches, progress=False)
    assert found.prediction == (plan, report)
    assert network.hidden.out_features == 12 and report.before.macs == 8 * 24 + 20 * 24 + 24 * 3


@pytest.mark.parametrize("call", [prune, lambda net, loader, **options: explain(net, dataloader=loader, **options)])
def test_wrappers_and_what_cannot_be_looked_into_are_refused(call):
    scripted = nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(64, 10)))
    for network, message in (
        (nn.DataParallel(plain_net()), "give its .module"),
        (Fabric(accelerator="cpu", devices=1).setup_module(plain_net()), "give its .module"),
        (scripted, "module '1' is TorchScript"),
    ):
        with pytest.raises(ValueError, match=message):
            call(network, loader(), progress=False)
