"""Slimming by switched-off channels, against the masked network."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_fscreen import load_slimmed, models, save_slimmed
from lightning_fscreen.slimming import SlimmingPlan, VerificationError, find_gates, slim
from lightning_fscreen.slimming.select import SELECT
from tests.slimming import difference, outputs, snapshot, untouched
from tests.slimming.networks import (
    ANY_SIZE,
    BLOCKS,
    HEADS,
    NORM_BLOCKS,
    Auxiliary,
    conv,
    glu,
    grouped,
    linear_norm,
    shuffle,
    shuffle_unit,
)

CASES = int(os.environ.get("FSCREEN_CASES", "40"))
BIASES = ["zero", "fold"]


@dataclass(repr=False)
class Case:
    """A random network in float64 with random batch norms, masks, an input, and whether it takes other resolutions."""

    network: nn.Module
    keep: dict[str, Tensor]
    example: Tensor
    any_size: bool
    bias: str

    def __repr__(self) -> str:
        masks = {name: mask.int().tolist() for name, mask in self.keep.items()}
        return f"{self.network} on {tuple(self.example.shape)}, {self.bias}, {masks}"


def randomize(network: nn.Module) -> None:
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None:
                module.weight.normal_()
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 2.0)
            if isinstance(module, nn.Dropout):
                module.p = 0.0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([2, 2, 1, 3]))
    blocks = draw(st.lists(st.sampled_from([*NORM_BLOCKS, *NORM_BLOCKS, *BLOCKS]), min_size=1, max_size=5))
    head = draw(st.sampled_from([*HEADS, linear_norm]))
    bias = draw(st.sampled_from(BIASES))
    together = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(3, 4, *[6 if rank == 3 else 8] * rank)
        layers: list[nn.Module] = [conv(4, rank, rng)]
        value = layers[0](x)
        for make in blocks:
            if make in (grouped, glu, shuffle, shuffle_unit) and value.shape[1] % 2:
                continue
            layers.append(make(value.shape[1], rank, rng))
            value = layers[-1].eval()(value)
        if rng.random() < 0.3:
            layers[-1] = nn.Sequential(layers[-1])
        layers.append(head(value.shape[1:], rank, rng))
        network: nn.Module = nn.Sequential(*layers)
        if rng.random() < 0.2:
            network = Auxiliary(network, 4, rank)
        network = network.double()
        randomize(network)
        for parameter in network.parameters():
            parameter.requires_grad_(rng.random() < 0.95)
        for module in network.modules():
            module.training = rng.random() < 0.5
        share = rng.choice([0.3, 0.5, 0.9])
        decided: dict[int, bool] = {}
        keep = {}
        for gate in find_gates(network, x.double()):
            module = network.get_submodule(gate.name)
            if module.weight is None or (together and gate.excluded):
                continue
            kept = [
                decided.setdefault(unit, rng.random() >= share) if together and unit >= 0 else rng.random() >= share
                for unit in gate.units
            ]
            keep[gate.name] = torch.tensor(kept)
            if not any(kept):
                keep[gate.name][rng.randrange(gate.channels)] = True
    return Case(network, keep, x.double(), head in ANY_SIZE, bias)


def masked_copy(network: nn.Module, keep: dict[str, Tensor], bias: str) -> nn.Module:
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, kept in keep.items():
            module = network.get_submodule(name)
            module.weight[~kept] = 0
            if bias == "zero":
                module.bias[~kept] = 0
    return network


def train_outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of a train-mode pass that leaves gradients, and writes to the running statistics."""
    network.train()
    torch.manual_seed(0)  # the same noise
    leaves = [leaf for leaf in pytree.tree_leaves(network(x)) if isinstance(leaf, Tensor)]
    generator = torch.Generator().manual_seed(1)
    total = sum((leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum() for leaf in leaves)
    if total.requires_grad:
        total.backward()
    return [leaf.detach() for leaf in leaves]


def check_training(
    masked: nn.Module, slimmed: nn.Module, plan: SlimmingPlan, keep: dict[str, Tensor], x: Tensor
) -> None:
    masked, slimmed = copy.deepcopy(masked), copy.deepcopy(slimmed)
    try:
        expected = train_outputs(masked, x)
    except RuntimeError as error:  # two in-place activations in a row cannot be trained, slim or not
        assert "inplace" in str(error)
        return
    assert difference(expected, train_outputs(slimmed, x)) < 1e-8
    own = dict(slimmed.named_parameters())
    pruned = {f"{name}.{part}": ~kept for name, kept in keep.items() for part in ("weight", "bias")}
    scale = max((float(p.grad.abs().max()) for p in masked.parameters() if p.grad is not None), default=1.0)
    for name, parameter in masked.named_parameters():
        if parameter.grad is None or own[name].grad is None:
            assert (parameter.grad is None) == (own[name].grad is None) or not bool(parameter.grad.any())
            continue
        gradient = parameter.grad.clone()
        if name in pruned:
            gradient[pruned[name]] = 0
            own[name].grad[plan.cut(name, pruned[name])] = 0
        assert float((plan.cut(name, gradient) - own[name].grad).abs().max()) < 1e-8 * max(scale, 1.0), name
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        batch = torch.randn(x.shape, generator=generator).double()
        for network in (masked, slimmed):
            torch.manual_seed(0)
            network(batch)
    buffers = dict(slimmed.named_buffers())
    for name, buffer in masked.named_buffers():
        if buffer.is_floating_point():
            assert torch.allclose(plan.cut(name, buffer), buffers[name], rtol=1e-8, atol=1e-8), name


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_masks_leave_the_function_of_the_masked_network(case: Case) -> None:
    network, example = case.network, case.example
    full = copy.deepcopy(network)
    masked = masked_copy(network, case.keep, case.bias)
    modes = [module.training for module in network.modules()]
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    plan = slim(network, case.keep, example, case.bias)
    assert [module.training for module in network.modules()] == modes
    assert {name: p.requires_grad for name, p in network.named_parameters() if name in flags} == flags
    generator = torch.Generator().manual_seed(1)
    for batch, more in [(1, 0), (3, 3 * case.any_size)]:
        x = torch.randn(batch, 4, *(size + more for size in example.shape[2:]), generator=generator).double() * 2
        assert difference(outputs(masked, x), outputs(network, x)) < 1e-9
    check_training(masked, network, plan, case.keep, example)
    added = sum(len(network.get_submodule(name).bias) for name in plan.biases)
    assert sum(p.numel() for p in network.parameters()) <= sum(p.numel() for p in full.parameters()) + added
    assert SlimmingPlan.from_json(plan.to_json()) == plan
    assert difference(outputs(network, example), outputs(copy.deepcopy(network), example)) == 0


@settings(max_examples=max(CASES // 4, 5), deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.integers(0, 2**31))
def test_a_second_slimming_goes_on_and_a_file_holds_both(tmp_path_factory: Any, case: Case, seed: int) -> None:
    network, example = case.network, case.example
    fresh = copy.deepcopy(network)
    slim(network, case.keep, example, case.bias)
    generator = torch.Generator().manual_seed(seed)
    second = {}
    for name in case.keep:
        size = network.get_submodule(name).num_features
        second[name] = torch.rand(size, generator=generator) < 0.7
        second[name][int(torch.randint(size, (), generator=generator))] = True
    masked = masked_copy(network, second, case.bias)
    slim(network, second, example, case.bias)
    assert difference(outputs(masked, example), outputs(network, example)) < 1e-9
    path = Path(tmp_path_factory.mktemp("slim")) / "model.safetensors"
    save_slimmed(network, path)
    loaded = load_slimmed(fresh, path)
    assert difference(outputs(network, example), outputs(loaded, example)) == 0
    program = torch.export.export(network.eval(), (example,))
    assert difference(outputs(network, example), outputs(program.module(), example)) < 1e-12


# ---- sizes, by hand


def mask(channels: int, *pruned: int) -> Tensor:
    kept = torch.ones(channels, dtype=torch.bool)
    kept[list(pruned)] = False
    return kept


def plain(padding: int = 1, bias: bool = False) -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=padding, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    randomize(network)
    return network


def test_a_chain_keeps_just_the_channels_that_are_kept() -> None:
    network = plain()
    plan = slim(network, {"1": mask(8, 0, 3, 5), "4": mask(6, 1)}, torch.randn(2, 3, 8, 8))
    assert network[0].weight.shape == (5, 3, 3, 3) and network[3].weight.shape == (5, 5, 3, 3)
    assert network[1].num_features == 5 and network[4].num_features == 5 and network[8].in_features == 5
    assert plan.cuts["1.weight"] == {0: (1, 2, 4, 6, 7)} and not plan.selects and not plan.biases


def test_one_channel_carries_the_constants_into_a_padded_convolution() -> None:
    network = plain()
    with torch.no_grad():
        network[1].bias.abs_()
    slim(network, {"1": mask(8, 0, 3, 5)}, torch.randn(2, 3, 8, 8), bias="fold")
    assert network[1].num_features == 6 and int((network[1].weight == 0).sum()) == 1 and network[3].bias is None


def test_without_padding_the_constants_become_a_bias() -> None:
    network = plain(padding=0)
    plan = slim(network, {"1": mask(8, 0, 3, 5)}, torch.randn(2, 3, 8, 8), bias="fold")
    assert network[1].num_features == 5 and network[3].bias is not None and plan.biases == ("3",)


def test_pre_activation_batch_norms_select_and_the_stream_stays() -> None:
    network = models.resnet20()
    before = network.stem.weight.shape
    plan = slim(network, {"blocks.0.norms.0": mask(16, 2, 5)}, torch.randn(2, 3, 16, 16))
    assert network.stem.weight.shape == before and network.blocks[0].convs[0].in_channels == 14
    assert plan.selects == {"blocks.0.norms.0": tuple(i for i in range(16) if i not in (2, 5))}
    assert SELECT not in "".join(network.state_dict())


def test_a_feature_that_nobody_selects_dies_in_its_own_convolution() -> None:
    network = models.densenet40()
    keep = {}
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            keep[name] = mask(module.num_features, 0)
    slim(network, keep, torch.randn(2, 3, 16, 16))
    assert network.stem.out_channels == 23


def test_coupled_channels_go_when_all_of_them_are_off() -> None:
    from torchvision.models import resnet18

    network, x = resnet18(), torch.randn(2, 3, 64, 64)
    keep = {name: mask(64, 7) for name in ("bn1", "layer1.0.bn2", "layer1.1.bn2")}
    slim(network, {"bn1": keep["bn1"]}, x)
    assert network.bn1.num_features == 64 and float(network.bn1.weight[7]) == 0
    slim(network, keep, x)
    assert network.bn1.num_features == 63 and network.layer2[0].conv1.in_channels == 63


# ---- what stays, and what is refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_layout_and_hooks_stay(dtype: torch.dtype) -> None:
    network = plain().to(dtype).to(memory_format=torch.channels_last)
    calls: list[str] = []
    network[1].register_forward_hook(lambda module, args, output: calls.append("hook"))
    classes = [type(module) for module in network.modules()]
    slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 8, 8, dtype=dtype))
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert [type(module) for module in network.modules()] == classes
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last)
    calls.clear()
    network.float()(torch.randn(2, 3, 8, 8))
    assert calls == ["hook"]


class Literal(nn.Module):
    """Sizes written as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = plain()[:6], nn.Linear(6 * 64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).view(-1, 2, 3, 8, 8).flatten(1))


def test_sizes_written_into_forward_keep_their_channels() -> None:
    network, x = Literal(), torch.randn(2, 3, 8, 8)
    keep = {"body.1": mask(8, 0, 1), "body.4": mask(6, 0, 3)}
    masked = masked_copy(network, keep, "zero")
    plan = slim(network, keep, x)
    assert network.body[1].num_features == 6 and network.body[4].num_features == 6
    assert "written into forward" in "".join(plan.pinned.values())
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-6


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body[:6](x)
        return self.body[6:](hidden) * hidden.shape[1]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"9": mask(8)}, r"'9', which is no batch norm of Sequential; they are \['1', '4'\]"),
        ({"0": mask(8)}, "'0', which is no batch norm"),
        ({"1": mask(7)}, r"keep\['1'\] must be a bool tensor of shape \(8,\), got torch.bool of shape \(7,\)"),
        ({"1": torch.ones(8)}, "got torch.float32"),
        ({"1": [True] * 8}, "got list"),
        ({"4": mask(6, *range(6))}, r"keep\['4'\] keeps none of 6 channels"),
    ],
)
def test_bad_masks_are_named_and_change_nothing(keep: Any, message: str) -> None:
    network = plain()
    before = snapshot(network)
    with pytest.raises(ValueError, match=message):
        slim(network, keep, torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="unknown bias 'mean'"):
        slim(network, {}, torch.randn(2, 3, 8, 8), bias="mean")
    assert untouched(network, before)


@pytest.mark.parametrize("bias", BIASES)
def test_a_failed_verification_changes_nothing(bias: str) -> None:
    network = Counts()
    before, text = snapshot(network), repr(network)
    with pytest.raises(VerificationError, match="Counts"):
        slim(network, {"body.4": mask(6, 0)}, torch.randn(2, 3, 8, 8), bias)
    assert untouched(network, before) and repr(network) == text
    assert not network.body[1]._forward_pre_hooks


def test_a_batch_norm_without_a_scale_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="'1' has no scale"):
        slim(network, {"1": mask(4, 0)}, torch.randn(2, 3, 8, 8))


def _call(network: nn.Module) -> Callable[..., Any]:
    return network.forward


def test_forward_is_the_same_method() -> None:
    network = plain()
    before = _call(network)
    slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 8, 8))
    assert _call(network) == before
