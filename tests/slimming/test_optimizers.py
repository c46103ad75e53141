"""Training in a plain loop goes on after `slim` as it does for the masked network; what cannot follow is refused."""

import copy
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen import slim
from lightning_fscreen.slimming.optimizers import Move, check_optimizers, move_parameters, unwrapped
from tests.slimming import snapshot, untouched

KEEP = {"1": torch.arange(8) % 3 != 1, "4": torch.arange(6) % 2 == 0}
STEPS = 20


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675: the sign of an interpolated momentum."""

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(p.grad, momentum, first).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - second)


class Wrapper:
    """As Lightning's or Accelerate's: it is no optimizer itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, maximize=False, weight_decay=1e-3),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "lion": Lion,
    "maximize": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.1, maximize=True),
}


def network():
    """Two gates; channels_last, as on most accelerators."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),  # its gradient would be nothing but rounding, of which Lion takes the sign
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 4),
    )
    return net.double().to(memory_format=torch.channels_last)


def switch_off(net, keep=KEEP):
    with torch.no_grad():
        for name, mask in keep.items():
            net.get_submodule(name).weight[~mask] = net.get_submodule(name).bias[~mask] = 0


def train(net, optimizers, steps, seed, scheduler=None, masked=False):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randn(8, 3, 6, 6, dtype=torch.double, generator=generator)
        loss = F.cross_entropy(net(images), torch.randint(4, (8,), generator=generator))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if masked:
            switch_off(net)


def cut(net, plan):
    return {name: plan.cut(name, tensor.detach()) for name, tensor in net.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_steps_are_those_of_the_masked_network(name):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    train(net, [optimizer], 5, seed=1, scheduler=scheduler)
    masked, other, later = copy.deepcopy((net, optimizer, scheduler))
    switch_off(masked)
    pending = {name: parameter.grad for name, parameter in net.named_parameters()}
    plan = slim(net, KEEP, torch.randn(2, 3, 6, 6).double(), optimizers=Wrapper(optimizer))
    for parameter, small in net.named_parameters():
        assert torch.equal(small.grad, plan.cut(parameter, pending[parameter]))
        state = [value for value in optimizer.state[small].values() if isinstance(value, torch.Tensor) and value.ndim]
        assert all(value.stride() == small.stride() for value in [small.grad, *state])
    train(net, [optimizer], STEPS, seed=2, scheduler=scheduler)
    train(masked, [other], STEPS, seed=2, scheduler=later, masked=True)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    for parameter, wanted in cut(masked, plan).items():
        assert torch.allclose(net.get_parameter(parameter), wanted, rtol=1e-7, atol=1e-9), parameter


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_muon_orthogonalises_the_smaller_matrices_and_adamw_beside_it_goes_on():
    """Zero rows and columns do not change what is left of an orthogonalised matrix.

    Torch's Muon computes it in bfloat16, and scales it by the matrix's shape where that has more rows than columns:
    here, before and after, none has.
    """

    def optimizers(net):
        return [
            torch.optim.Muon([net[0].weight, net[3].weight], lr=1e-2, weight_decay=0.01),
            torch.optim.AdamW([net[0].bias, net[3].bias, *net[1].parameters()], lr=1e-3),
        ]

    keep = {"1": torch.arange(24) < 16}
    net = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8)).double()
    used = optimizers(net)
    step(net, used, seed=1)
    masked = copy.deepcopy(net)
    others = optimizers(masked)
    for ours, theirs in zip(used, others, strict=True):
        theirs.load_state_dict(ours.state_dict())
    switch_off(masked, keep)
    plan = slim(net, keep, torch.randn(4, 24).double(), optimizers=used)
    assert plan.removed == {"0": 8}
    # As masks do that are enforced in the state, too.
    others[0].state[masked[0].weight]["momentum_buffer"][16:] = 0
    others[0].state[masked[3].weight]["momentum_buffer"][:, 16:] = 0
    start = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    for seed in range(2, 22):
        step(net, used, seed)
        step(masked, others, seed)
    for name, old in start.items():
        small, large = net.get_parameter(name).detach(), plan.cut(name, masked.get_parameter(name).detach())
        # The others' gradients come through matrices that differ by that rounding.
        tolerance = 0.02 if name in ("0.weight", "3.weight") else 0.1
        assert (small - large).norm() < tolerance * (small - old).norm(), name


def step(net, optimizers, seed):
    generator = torch.Generator().manual_seed(seed)
    for optimizer in optimizers:
        optimizer.zero_grad()
    net(torch.randn(16, net[0].in_features, dtype=torch.double, generator=generator)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def stepped(kind, net):
    optimizer = kind(net.parameters())
    F.mse_loss(net(torch.randn(2, 3, 6, 6).double()), torch.zeros(2, 4).double()).backward()
    optimizer.step()
    return optimizer


class Lists(Lion):
    def step(self):
        super().step()
        for state in self.state.values():
            state["history"] = [state["exp_avg"]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda net: stepped(torch.optim.Adafactor, net), NotImplementedError, "Adafactor keeps 'row_var' of shape"),
        (lambda net: torch.optim.LBFGS(net.parameters()), NotImplementedError, "LBFGS keeps one state for all"),
        (
            lambda net: stepped(Lists, net),
            NotImplementedError,
            "Lists keeps 'history', a list of tensors",
        ),
        (lambda net: torch.optim.SGD(network().parameters()), ValueError, r"none of \['SGD'\] has a parameter .*anew"),
        (lambda net: "adam", TypeError, "optimizers has a str"),
    ],
)
def test_what_cannot_follow_is_refused_before_anything_changes(make, error, message):
    net = network()
    optimizer = make(net)
    before = snapshot(net)
    with pytest.raises(error, match=message):
        slim(net, KEEP, torch.randn(2, 3, 6, 6).double(), optimizers=optimizer)
    assert untouched(net, before)


def test_without_the_optimizer_a_warning_names_what_it_goes_on_with(caplog):
    net = network()
    optimizer = torch.optim.SGD(net.parameters())
    with caplog.at_level(logging.WARNING):
        slim(net, {"1": KEEP["1"]}, torch.randn(2, 3, 6, 6).double())
        assert not caplog.records  # nothing speaks for a training
        optimizer = torch.optim.SGD(net.parameters())
        train(net, [optimizer], 1, seed=1)
        slim(net, {"4": KEEP["4"]}, torch.randn(2, 3, 6, 6).double())
    (record,) = caplog.records
    assert "'3.weight' is the first" in record.getMessage() and "optimizers=[optimizer]" in record.getMessage()


def test_added_biases_join_the_group_of_their_weight_once_and_by_name():
    weight, small = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    other, bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([("layer.weight", weight), ("other", other)], momentum=0.9)
    wrapped = unwrapped([Wrapper(optimizer), optimizer])
    assert wrapped == [optimizer]
    group = optimizer.param_groups[0]
    for _ in range(2):
        move_parameters(wrapped, [Move(weight, small, lambda tensor: tensor[:2])], {bias: small})
    assert optimizer.param_groups[0] is group and [id(p) for p in group["params"]] == [id(small), id(other), id(bias)]
    assert group["param_names"] == ["layer.weight", "other", "layer.bias"]


def test_a_parameter_that_has_been_replaced_is_free_before_the_next_is():
    old = [nn.Parameter(torch.ones(size)) for size in (8, 2, 4)]
    optimizer = torch.optim.SGD(old, lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in old).backward()
    optimizer.step()
    held, free = [weakref.ref(parameter) for parameter in old], []

    def cut(values):
        free.append([reference() is None for reference in held])
        return values[:1]

    new = [nn.Parameter(torch.ones(1)) for _ in old]
    move_parameters([optimizer], (Move(old.pop(0), parameter, cut) for parameter in new))
    orders = ([False, False, False], [False, True, False], [False, True, True])
    assert free == [order for order in orders for _ in ("gradient", "momentum")]
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], new, strict=True)] == [True] * 3


def test_sharded_optimizers_are_refused():
    kind = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})
    with pytest.raises(NotImplementedError, match="use the optimizer that it wraps"):
        check_optimizers([kind([nn.Parameter(torch.zeros(1))])])
