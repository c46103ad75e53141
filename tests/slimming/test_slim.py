"""Slimming by switched-off channels, against the masked network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen import load_slimmed, models, save_slimmed
from lightning_fscreen.slimming import CaptureError, VerificationError, slim
from lightning_fscreen.slimming.carried import plan_of
from lightning_fscreen.slimming.fits import check_fits
from lightning_fscreen.slimming.select import SELECT
from lightning_fscreen.slimming.sizes import Size
from tests.slimming import difference, outputs, snapshot, untouched
from tests.slimming.masked import (
    BIASES,
    CASES,
    KEPT,
    Case,
    Stem,
    cases,
    check_slimming,
    dags,
    mask,
    masked_copy,
    plain,
    randomize,
)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_masks_leave_the_function_of_the_masked_network(case: Case) -> None:
    check_slimming(case)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(dags())
def test_any_graph_keeps_the_function_of_the_masked_network(case: Case) -> None:
    check_slimming(case)


@settings(max_examples=max(CASES // 4, 5), deadline=None, suppress_health_check=list(HealthCheck))
@given(cases() | dags(), st.integers(0, 2**31))
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
    torch.compiler.reset()  # torch 2.6 counts exports of other networks as recompilations, and has a limit
    program = torch.export.export(network.eval(), (example,))
    assert difference(outputs(network, example), outputs(program.module(), example)) < 1e-12


# ---- sizes, by hand


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
    network: Any = models.resnet20()
    before = network.stem.weight.shape
    plan = slim(network, {"blocks.0.norms.0": mask(16, 2, 5)}, torch.randn(2, 3, 16, 16))
    assert network.stem.weight.shape == before and network.blocks[0].convs[0].in_channels == 14
    assert plan.selects == {"blocks.0.norms.0": tuple(i for i in range(16) if i not in (2, 5))}
    assert SELECT not in "".join(network.state_dict())


def test_a_feature_that_nobody_selects_dies_in_its_own_convolution() -> None:
    network: Any = models.densenet40()
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

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(x).view(-1, 2, 3, 8, 8).flatten(1))


def test_sizes_written_into_forward_follow() -> None:
    network, x = Literal(), torch.randn(2, 3, 8, 8)
    keep = {"body.1": mask(8, 0, 1), "body.4": mask(6, 0, 3)}
    masked = masked_copy(network, keep, "zero")
    plan = slim(network, keep, x)
    assert network.body[1].num_features == 6 and network.body[4].num_features == 4
    assert plan.sizes == {"": (Size("view", 5, 2, 3, 2, reads=((-3, 4),)),)}
    for batch in (x, torch.randn(5, 3, 8, 8)):
        assert difference(outputs(masked, batch), outputs(network, batch)) < 1e-6


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> Any:
        hidden = self.body[:6](x)
        return self.body[6:](hidden) * hidden.shape[1]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            {"9": mask(8)},
            r"'9', which is no batch norm, linear or convolution layer of Sequential, nor an attention whose heads can "
            r"be followed; they are \['0', '1',",
        ),
        ({"2": mask(8)}, "'2', which is no batch norm"),
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
    with pytest.raises(ValueError, match=r"'1' has no scale of its own.*leave it out"):
        slim(network, {"1": mask(4, 0)}, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("attribute", "named"), [("weight", "scale"), ("bias", "shift")])
def test_a_scale_or_shift_that_is_computed_is_refused(attribute: str, named: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    nn.utils.parametrize.register_parametrization(network[1], attribute, nn.Softplus())
    before = snapshot(network)
    with pytest.raises(ValueError, match=f"'1' has no {named} of its own.*leave it out"):
        slim(network, {"1": mask(4, 0)}, torch.randn(2, 3, 8, 8))
    assert untouched(network, before)


def _call(network: nn.Module) -> Callable[..., Any]:
    return network.forward


def test_forward_is_the_same_method() -> None:
    network = plain()
    before = _call(network)
    slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 8, 8))
    assert _call(network) == before


class ChecksItsSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> Any:
        hidden = self.body[:3](x)
        if hidden.shape[1] != 8:
            raise ValueError("expected 8 channels")
        return self.body[3:](hidden)


class Branches(ChecksItsSize):
    def forward(self, x: Tensor) -> Any:
        return self.body(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("kind", "error"), [(ChecksItsSize, VerificationError), (Branches, CaptureError)])
def test_a_network_that_cannot_be_slimmed_is_named_and_untouched(
    kind: type[ChecksItsSize], error: type[Exception], bias: str
) -> None:
    network = kind().train()
    network.body[1].eval()
    before, text, modes = snapshot(network), repr(network), [m.training for m in network.modules()]
    with pytest.raises(error, match=kind.__name__):
        slim(network, {"body.1": mask(8, 0, 5)}, torch.randn(2, 3, 8, 8), bias)
    assert untouched(network, before) and repr(network) == text
    assert [module.training for module in network.modules()] == modes


def test_masks_that_keep_everything_change_nothing() -> None:
    network = plain()
    before = snapshot(network)
    assert not slim(network, {"1": mask(8), "4": mask(6)}, torch.randn(2, 3, 8, 8))
    assert not slim(network, {}, torch.randn(2, 3, 8, 8))
    assert untouched(network, before)


def depthwise(spread: int = 1, bias: bool = True) -> Any:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4 * spread, 3, padding=1, groups=4, bias=bias),
        nn.BatchNorm2d(4 * spread) if spread > 1 else nn.Identity(),
        nn.Conv2d(4 * spread, 2, 3, padding=1),
    ).double()
    randomize(network)
    return network


def test_gradients_of_a_depthwise_bias_are_those_of_the_masked_network() -> None:
    """The bias of a pruned channel is a constant; where it carries another one's, its gradient is no longer its own."""
    network, x = depthwise(), torch.randn(3, 3, 6, 6).double()
    keep = {"1": mask(4, 0, 1)}
    masked = masked_copy(network, keep, "zero")
    plan = slim(network, keep, x)
    for net in (masked, network):
        (net(x) * torch.linspace(-1, 1, 36).double().view(6, 6)).sum().backward()
    assert torch.allclose(plan.cut("3.bias", masked[3].bias.grad), network[3].bias.grad)


def test_a_depthwise_multiplier_of_one_channel_can_be_slimmed_again_and_loaded() -> None:
    network, x = depthwise(spread=2), torch.randn(2, 3, 6, 6).double()
    fresh = copy.deepcopy(network)
    slim(network, {"1": mask(4, 1, 2, 3), "4": mask(8, 2, 3, 4, 5, 6, 7)}, x)
    assert (network[3].groups, network[3].out_channels) == (1, 2)
    slim(network, {"4": mask(2, 1)}, x)
    check_fits(plan_of(network), fresh)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_that_casts_its_input_to_half_precision_can_be_slimmed(dtype: torch.dtype, bias: str) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain(padding=0)

        def forward(self, x: Tensor) -> Any:
            return self.body(x.to(dtype))

    network = Casts()
    slim(network.to(dtype), {"body.1": mask(8, 0, 3, 4, 5)}, torch.randn(2, 3, 6, 6), bias)
    assert network.body[1].num_features == 4


def test_a_network_slimmed_in_inference_mode_can_be_trained() -> None:
    network = plain()
    with torch.inference_mode():
        slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 8, 8))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert network[0].weight.grad is not None


def test_slopes_are_counted() -> None:
    network: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 2, 1))
    slim(network, {"1": mask(8, 0, 1)}, torch.randn(2, 3, 6, 6))
    assert network[2].weight.shape == (6,) and network[2].num_parameters == 6


@pytest.mark.parametrize(("slopes", "padding", "left"), [(8, 0, 5), (8, 1, 7), (1, 0, 7), (1, 1, 7)])
def test_constants_pass_slopes(slopes: int, padding: int, left: int) -> None:
    """But not one for all channels, which they train, nor padding past which one of them would carry the others."""
    network: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.PReLU(slopes), nn.Conv2d(8, 2, 3, padding=padding)
    )
    network[1].bias.data[:3] = torch.tensor([0.0, 1.0, -1.0])
    slim(network, {"1": mask(8, 0, 1, 2)}, torch.randn(2, 3, 6, 6), "fold")
    assert network[3].in_channels == left


def test_hooks_of_a_batch_norm_that_selects_see_the_whole_stream_first() -> None:
    class Net(Stem):
        def forward(self, x: Tensor) -> Any:
            h = self.stem(x)
            return self.left(self.norm(h).relu()) + self.right(h)

    network, x = Net(), torch.randn(2, 3, 6, 6)
    seen: dict[str, int] = {}

    def count(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen["backward"] = outputs[0].shape[1]

    network.norm.register_forward_pre_hook(lambda module, args: seen.update(pre=args[0].shape[1]))
    network.norm.register_forward_hook(lambda module, args, output: seen.update(post=output.shape[1]))
    network.norm.register_full_backward_hook(count)
    slim(network, {"norm": KEPT}, x)
    seen.clear()
    network(x).sum().backward()
    assert seen == {"pre": 8, "post": 5, "backward": 5}


class TwoInputs(nn.Module):
    """Tuple of a dict and a list out; keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth = plain()[:3], plain()[:3]
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, image: Tensor, *, depth: Tensor, scale: float = 1.0) -> Any:
        h = self.image(image) + scale * self.depth(depth)
        return {"out": self.last(h)}, [self.last(h.relu()), scale]


@pytest.mark.parametrize("bias", BIASES)
def test_several_inputs_by_name_and_nested_outputs(bias: str) -> None:
    network = TwoInputs().double()
    keep = {"image.1": KEPT, "depth.1": KEPT}
    masked = masked_copy(network, keep, bias)
    inputs = {"image": torch.randn(2, 3, 6, 6).double(), "depth": torch.randn(2, 3, 6, 6).double(), "scale": 2.0}
    plan = slim(network, keep, inputs, bias)
    removed = {"image.0": 3, "depth.0": 3}
    if bias == "fold":  # one channel carries the constants, but it needs nothing in front of it
        removed |= {"image.1": 2, "depth.1": 2}
    assert plan.removed == removed
    other = {"image": torch.randn(4, 3, 9, 7).double(), "depth": torch.randn(4, 3, 9, 7).double(), "scale": 2.0}
    assert difference(outputs(masked, **other), outputs(network, **other)) < 1e-9
