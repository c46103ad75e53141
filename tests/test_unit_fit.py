"""Units without batch norms, pruned and removed while their network trains."""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback, load_slimmed, save_slimmed
from tests.conftest import Classifier, digits, loader, trainer
from tests.slimming.attentions import Attention
from tests.test_channel_fit import OPTIMIZERS, Around, fitted


class Mixer(nn.Module):
    """A ConvNeXt block: depthwise convolution, LayerNorm, four times as many hidden units, LayerScale."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.down(F.gelu(self.up(self.norm(self.mix(x).permute(0, 2, 3, 1)))))
        return x + (self.scale * y).permute(0, 3, 1, 2)


def convnext():
    """A small ConvNeXt: only the hidden units of its blocks can go, since LayerNorms read the stream."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 2, 2), Mixer(8), Mixer(8), *head)


def plain_net(activation=nn.ReLU):
    """Convolutions and linear layers without any norm."""
    convolutions = [nn.Conv2d(1, 12, 3, padding=1), activation(), nn.Conv2d(12, 16, 3, padding=1), activation()]
    return nn.Sequential(*convolutions, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def sigmoid_net():
    """The same, where the constants of what is pruned meet zero padding."""
    return plain_net(nn.Sigmoid)


def mixed_net():
    """Channels of a batch norm and hidden units of a head."""
    head = [nn.Linear(12 * 4, 40), nn.GELU(), nn.Linear(40, 10)]
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), *head)


class Attentive(nn.Module):
    """Rows of an image attend to each other, by a layer of torch and by one whose sizes are those of the stream."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 10)
        self.first = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.second = Attention(16, 4, 4, 4, "matmul", "of the stream", True, True, "scale", causal=False)

    def forward(self, x):
        x = self.first(self.embed(x.view(-1, 8, 8)))
        return self.head((x + self.second(x)).mean(1))


NETS = {
    "convnext": convnext,
    "plain": plain_net,
    "sigmoid": sigmoid_net,
    "mixed": mixed_net,
    "attention": Attentive,
}
UNITS = {"convnext": 64, "plain": 12 + 16 + 32, "sigmoid": 12 + 16 + 32, "mixed": 12 + 40, "attention": 24 + 4 + 4}
Pruning = functools.partial(ScreeningPruningCallback, "unit", amount=0.5, end_epoch=2)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("bias", ["zero", "fold", "mean"])
def test_slimming_in_the_fit_changes_no_loss_and_every_parameter_goes_on_learning(net, bias):
    callback = Pruning(bias=bias)
    around = Around(callback)
    model, _ = fitted(callback, "adamw", NETS[net], [around], max_epochs=3)
    report = callback.report()
    assert (report.total, report.kept) == (UNITS[net], UNITS[net] // 2)
    assert report.after.params == sum(p.numel() for p in model.parameters()) < report.before.params
    before, after = around.losses[1:3]
    assert after == pytest.approx(before, abs=1e-5) and not around.unmoved


class Averaged(Classifier):
    """With a moving average of its network."""

    def __init__(self, net, optimizer):
        super().__init__(net, optimizer)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        self.average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=average)

    def on_train_batch_end(self, *args):
        self.average.update_parameters(self.net)


@pytest.mark.parametrize("net", ["convnext", "plain", "mixed", "attention"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_slims_equals_the_run_with_masks_only(net, optimizer):
    """Gradients, momentum and moving averages of the small network are those of the masked one."""
    outputs = []
    for slim in (True, False):
        torch.manual_seed(0)
        model, callback = Averaged(NETS[net](), OPTIMIZERS[optimizer]), Pruning(slim=slim)
        trainer([callback], max_epochs=4).fit(model, loader())
        outputs.append([network.eval()(digits(64)[0]) for network in (model.net, model.average)])
        assert slim == bool(callback.plan)
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


def test_with_batch_norms_alone_units_are_the_channels():
    """To the bit, in everything that a fit leaves."""
    runs = []
    for granularity in ("unit", "channel"):
        callback = ScreeningPruningCallback(granularity, amount=0.5, end_epoch=2)
        model, _ = fitted(callback, max_epochs=3)
        runs.append((model.state_dict(), callback.plan, callback.masks))
    (first, plan, masks), (second, other_plan, other_masks) = runs
    assert plan.is_like(other_plan) and masks.keys() == other_masks.keys()
    assert all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("arguments", [{"rewind_weights": True}, {"soft": True}, {"scope": "kind"}, {"end_epoch": 0}])
def test_what_channels_can_do(arguments):
    callback = Pruning(**arguments)
    model, _ = fitted(callback, net=mixed_net, max_epochs=4)
    report = callback.report()
    assert report.kept == 26 and not report.not_removed
    assert report.after.params == sum(p.numel() for p in model.parameters())
    if "scope" in arguments:
        assert {layer.name: layer.kept for layer in report.layers} == {"net.1": 6, "net.5": 20}


@pytest.mark.parametrize(
    "criterion", ["screening_sum", "screening_product", "taylor", "gradient", "activation", "random"]
)
def test_every_criterion_ranks_units(criterion):
    callback = Pruning(criterion=criterion)
    fitted(callback, net=mixed_net, max_epochs=3)
    assert callback.report().kept == 26
    if criterion in ("taylor", "gradient", "random"):  # nobody sees the heads that nn.MultiheadAttention makes
        fitted(callback := Pruning(criterion=criterion), net=Attentive, max_epochs=3)
        assert callback.report().kept == 16


@pytest.mark.parametrize(("patterns", "layers"), [("kind=neuron", [4, 4]), ("kind=head", [24]), ("*.second", [24, 4])])
def test_kinds_and_heads_are_left_out_by_patterns(patterns, layers):
    callback = Pruning(exclude=patterns)
    fitted(callback, net=Attentive, max_epochs=3)
    report = callback.report()
    assert [layer.total for layer in report.layers] == layers and report.kept == sum(layers) // 2
    assert f"left out by exclude=[{patterns!r}]" in report.not_pruned.values()


def test_heads_say_how_they_were_ranked():
    callback = Pruning()
    fitted(callback, net=Attentive, max_epochs=3)
    report = callback.report()
    evidence = {layer.name: layer.evidence["trusted"] for layer in report.layers}
    assert "nn.MultiheadAttention" in evidence["net.first.self_attn"] and "learned" in evidence["net.second"]
    assert report.not_pruned["net.second.qkv"].startswith("its outputs belong to the heads of 'net.second'")
    assert not [name for name in report.not_pruned if name.startswith("net.first.self_attn")]


def test_layers_that_keep_their_units_say_why():
    callback = Pruning(exclude="net.1.up", min_channels=20, amount=0.375)
    fitted(callback, net=convnext, max_epochs=3)
    report = callback.report()
    assert {layer.name: (layer.total, layer.kept) for layer in report.layers} == {"net.2.up": (32, 20)}
    reasons = report.not_pruned
    assert reasons["net.1.up"] == "left out by exclude=['net.1.up']"
    assert reasons["net.5"] == "it is an output of the network"
    assert "it normalises over all channels" in reasons["net.0"]


def test_a_convolution_in_front_of_a_batch_norm_has_no_units_of_its_own():
    callback = Pruning()
    fitted(callback, net=mixed_net, max_epochs=3)
    reason = "a batch norm normalises its outputs, and the channels of that are the units"
    assert callback.report().not_pruned["net.0"] == reason


def test_sequences_may_come_first_and_modules_and_weights_may_be_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last, self.head = (
                nn.Linear(*size) for size in ((8, 12), (12, 12), (12, 8), (8, 10))
            )
            self.last.weight = nn.Parameter(self.first.weight.t().clone())
            self.again = self.inner

        def forward(self, x):
            x = F.relu(self.first(x.view(-1, 8, 8).transpose(0, 1)))
            return self.head(F.relu(self.last(F.relu(self.again(F.relu(self.inner(x)))))).mean(0))

    callback = Pruning()
    model, _ = fitted(callback, net=Shared, max_epochs=3)
    report = callback.report()
    assert {layer.name for layer in report.layers} == {"net.first", "net.inner", "net.last"} and not report.not_removed
    assert report.after.params == sum(p.numel() for p in model.parameters()) < report.before.params
    assert all("ran on 8 instances" in layer.evidence["trusted"] for layer in report.layers)


def test_recurrent_layers_are_listed():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.attention = nn.LSTM(8, 12, batch_first=True), nn.MultiheadAttention(12, 2, batch_first=True)
            self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 10)

        def forward(self, x):
            x = self.lstm(x.view(-1, 8, 8))[0]
            return self.head(F.relu(self.hidden(self.attention(x, x, x, need_weights=False)[0][:, -1])))

    callback = Pruning()
    fitted(callback, net=Recurrent, max_epochs=3)
    report = callback.report()
    assert {layer.name: layer.total for layer in report.layers} == {"net.hidden": 16, "net.attention": 2}
    reasons = report.not_pruned
    only = "only units of linear and convolution layers are candidates"
    assert reasons["net.lstm.weight_ih_l0"] == f"a parameter of LSTM: {only}"


def test_a_floor_that_leaves_too_little_to_prune_is_refused():
    with pytest.raises(ValueError, match="at least 20 in each of 2 layers makes 40; lower amount or the floor"):
        fitted(Pruning(min_channels=20), net=convnext, max_epochs=3)


@pytest.mark.parametrize("net", [convnext, Attentive])
def test_a_slim_network_is_saved_loaded_exported_and_compiled(net, tmp_path):
    model, _ = fitted(Pruning(), net=net, max_epochs=3)
    network, images = model.net.eval(), digits(8)[0]
    expected = network(images)
    save_slimmed(network, tmp_path / "slim.safetensors")
    torch.testing.assert_close(load_slimmed(net(), tmp_path / "slim.safetensors").eval()(images), expected)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager")(images), expected)
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(network, (images,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (exported,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(exported), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_plan_of_another_callback_is_followed():
    """Weights go on where units have been removed."""
    units, weights = Pruning(), ScreeningPruningCallback("weight", amount=0.9, end_epoch=3)
    fitted(units, net=plain_net, callbacks=[weights], max_epochs=4)
    assert weights.report().pruned_fraction == pytest.approx(0.9, abs=1e-3) and units.plan


def test_nothing_changes_where_nothing_is_pruned():
    model, reference = (copy.deepcopy(net) for net in [Classifier(plain_net())] * 2)
    torch.manual_seed(0)
    trainer([Pruning(amount=0.0)], max_epochs=2).fit(model, loader())
    torch.manual_seed(0)
    trainer([], max_epochs=2).fit(reference, loader())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_network_without_hidden_units_is_refused():
    with pytest.raises(ValueError, match="it is an output of the network"):
        fitted(Pruning(), net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


class Windows(nn.Module):
    """Its hidden layer runs on four windows of every image, one after another."""

    def __init__(self):
        super().__init__()
        self.embed, self.inside, self.mix, self.head = (nn.Linear(16, n) for n in (16, 12, 16, 10))
        self.out = nn.Linear(12, 16)

    def forward(self, x):
        windows = F.unfold(x.view(-1, 1, 8, 8), 4, stride=4).transpose(1, 2)
        windows = self.mix(F.relu(self.embed(windows)))
        hidden = self.out(F.relu(self.inside(windows.flatten(0, 1))))
        return self.head(F.relu(hidden.view(len(x), 4, 16).mean(1)))


def test_layers_that_run_on_windows_are_ranked_by_magnitude():
    callback = Pruning()
    fitted(callback, net=Windows, max_epochs=3)
    report = callback.report()
    trusted = {layer.name: layer.evidence["trusted"] for layer in report.layers}
    assert "ran on 256 instances, but the batch has 64 labels" in trusted["net.inside"]
    assert "learned" in trusted["net.embed"] and 2 * report.kept == report.total
    with pytest.raises(ValueError, match="leave the layer out with exclude='net.inside'"):
        fitted(Pruning(criterion="screening_sum"), net=Windows, max_epochs=3)
