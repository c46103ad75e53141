"""Copies that follow a network: averages go on after slimming as those of the masked network do."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_fscreen import slim
from lightning_fscreen.slimming import VerificationError, remove_dead_units
from lightning_fscreen.slimming.carried import plan_of
from lightning_fscreen.slimming.copies import Copy
from tests.slimming import difference, outputs, snapshot, untouched

KEEP = {"norm": torch.arange(8) % 3 != 1}


class Reads(nn.Module):
    """A batch norm that reads a stream beside another reader, and so has to select; its constants meet zero padding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 4, 3, padding=1)
        self.skip = nn.Conv2d(8, 4, 1)
        self.head = nn.Sequential(OrderedDict(flat=nn.Flatten(), fc=nn.Linear(64, 3)))

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.conv(self.norm(x).tanh()) + self.skip(x))


def trained(net, optimizer, average, steps, seed, masked=(), bias="zero"):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 2, 4, 4, dtype=torch.double, generator=generator)).square().sum().backward()
        for name, mask in dict(masked).items():
            gate = net.get_submodule(name)
            gate.weight.grad[~mask] = gate.bias.grad[~mask] = 0
        optimizer.step()
        average(net)


def averaged(kind, net):
    if kind == "by hand":
        teacher = copy.deepcopy(net)

        @torch.no_grad()
        def update(model):
            for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

        return teacher, update
    functions = {"each": {"avg_fn": get_ema_avg_fn(0.9)}, "all": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, "swa": {}}
    model = AveragedModel(net, use_buffers=kind != "swa", **functions[kind])
    return model, model.update_parameters


@pytest.mark.parametrize("kind", ["by hand", "each", "all", "swa"])
@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_averages_go_on_as_those_of_the_masked_network(kind, bias):
    net = Reads().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    follower, update = averaged(kind, net)
    trained(net, optimizer, update, 5, seed=1)
    masked, other, average = copy.deepcopy((net, optimizer, follower))
    theirs = masked, (average if kind == "by hand" else average.module)
    with torch.no_grad():
        for name, mask in KEEP.items():
            for part in theirs:  # the averages take the network's values where it is pruned
                part.get_submodule(name).weight[~mask] = 0
                part.get_submodule(name).bias[~mask] = 0 if bias == "zero" else masked.get_submodule(name).bias[~mask]
    plan = slim(net, KEEP, torch.randn(2, 2, 4, 4).double(), bias, optimizers=optimizer, follow=follower)
    small = follower if kind == "by hand" else follower.module
    assert plan and plan.selects and plan_of(small) == plan_of(net)
    x = torch.randn(5, 2, 4, 4).double()
    assert difference(outputs(theirs[1], x), outputs(small, x)) < 1e-12
    if bias == "fold":
        return  # the constants that were carried are trained in another place from here on
    if kind == "by hand":

        @torch.no_grad()
        def average_update(model):
            for mine, others in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(others, 0.1)
    else:
        average_update = average.update_parameters
    trained(net, optimizer, update, 10, seed=2)
    trained(masked, other, average_update, 10, seed=2, masked=KEEP)
    for name, tensor in small.named_parameters():
        assert torch.allclose(tensor, plan.cut(name, dict(theirs[1].named_parameters())[name]), rtol=1e-9, atol=1e-12)
    assert difference(outputs(theirs[1], x), outputs(small, x)) < 1e-9


def test_a_part_of_the_network_can_have_a_copy_and_two_copies_are_cut_alike():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)).double()
    part, whole = copy.deepcopy(net[0]), copy.deepcopy(net)
    with torch.no_grad():
        for body in (net[0], part, whole[0]):
            body[0].weight.add_(torch.randn_like(body[0].weight))
            body[0].weight[2] = body[0].bias[2] = body[2].weight[4] = body[2].bias[4] = 0
    before = copy.deepcopy((part, whole))
    plan = remove_dead_units(net, (torch.randn(2, 3).double(),), copies=[Copy("part", part, "0"), Copy("whole", whole)])
    assert plan.removed == {"0.0": 1, "0.2": 1} and part[2].out_features == whole[2].in_features == 5
    assert plan_of(part).under("0").cuts.items() <= plan.cuts.items()
    x = torch.randn(4, 3).double()
    kept = torch.tensor([0, 1, 2, 3, 5])
    assert difference(outputs(before[0], x)[0][:, kept], outputs(part, x)[0]) < 1e-12
    assert difference(outputs(before[1], x), outputs(whole, x)) < 1e-12


def test_a_copy_that_would_lose_other_channels_stops_everything():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight[2] = net[0].bias[2] = 0
    follower = copy.deepcopy(net)
    with torch.no_grad():
        follower[0].weight[2] = 1
    before = snapshot(net), snapshot(follower)
    with pytest.raises(VerificationError, match="the average would lose other channels than the network"):
        remove_dead_units(net, (torch.randn(2, 3),), copies=[Copy("the average", follower)])
    assert untouched(net, before[0]) and untouched(follower, before[1])


def test_what_cannot_follow_is_refused_by_name_before_anything_changes():
    net = Reads()
    x, before = torch.randn(2, 2, 4, 4), snapshot(net)
    with pytest.raises(ValueError, match=r"follow\[1\], a Linear, holds no copy of the Reads"):
        slim(net, KEEP, x, follow=[AveragedModel(net), nn.Linear(2, 2)])
    tied = copy.deepcopy(net)
    tied.stem.weight = net.stem.weight
    with pytest.raises(ValueError, match=r"follow\[0\] shares 'stem.weight' with the network"):
        slim(net, KEEP, x, follow=[tied])
    assert untouched(net, before)
