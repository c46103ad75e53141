from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.rewrite import install, overwrite
from tests.slimming import snapshot, untouched


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 9, 3, bias=False),
    )


KEPT = (0, 2, 5)
OUT = (1, 3)
COLUMNS = tuple(range(9, 18)) + tuple(range(27, 36))
PLAN = SlimmingPlan(
    shapes={},
    cuts={
        "0.weight": {0: KEPT},
        **{f"1.{name}": {0: KEPT} for name in ("weight", "bias", "running_mean", "running_var")},
        "2.weight": {0: KEPT},
        "2.bias": {0: KEPT},
        "3.weight": {0: KEPT, 1: OUT},
        "3.bias": {0: OUT},
        "5.weight": {1: COLUMNS},
    },
    groups={"2": 3},
    biases=("0", "5"),
)


def new_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What stays, in float64; and the biases that are added."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return {
        **{name: PLAN.cut(name, tensor) for name, tensor in state.items() if name in PLAN.cuts},
        "0.bias": torch.ones(3).double(),
        "5.bias": torch.ones(3).double(),
    }


def test_sizes_match_the_new_tensors() -> None:
    model = network()
    install(model, PLAN, new_tensors(model))
    assert (model[0].out_channels, model[0].in_channels) == (3, 2)
    assert model[1].num_features == 3
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (3, 3, 3)
    assert (model[3].in_channels, model[3].out_channels) == (3, 2)
    assert (model[5].in_features, model[5].out_features) == (18, 3)
    assert model(torch.randn(2, 2, 4, 4)).shape == (2, 3)
    assert repr(model[2]) == repr(nn.Conv2d(3, 3, 3, groups=3))


def test_flags_dtypes_and_layouts_stay() -> None:
    model = network().half().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[1].eps = 0.5
    untouched_weight = model[1].num_batches_tracked
    install(model, PLAN, new_tensors(model))
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert model[5].bias.requires_grad and isinstance(model[5].bias, nn.Parameter)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].num_batches_tracked is untouched_weight
    assert all(p.is_leaf for p in model.parameters())


def test_shared_tensors_stay_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    kept = SlimmingPlan({}, {"0.weight": {0: (1, 2), 1: (1, 2)}, "0.bias": {0: (1, 2)}, "1.bias": {0: (1, 2)}})
    install(model, kept, {name: kept.cut(name, tensor) for name, tensor in model.named_parameters()})
    assert model[1].weight is model[0].weight and model[0].weight.shape == (2, 2)
    assert (model[1].in_features, model[1].out_features) == (2, 2)


def test_undo_puts_the_very_same_objects_back() -> None:
    model = network()
    before, text = snapshot(model), repr(model)
    undo = install(model, PLAN, new_tensors(model))
    assert not untouched(model, before) and repr(model) != text
    undo()
    assert untouched(model, before) and repr(model) == text
    assert model[0].bias is None and model[5].bias is None
    assert {name for name, _ in model.named_parameters()} == set(before) - {name for name, _ in model.named_buffers()}


def test_an_error_in_the_middle_puts_everything_back() -> None:
    class NoRoom(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            if name == "3.bias":
                raise torch.OutOfMemoryError("no room")
            return super().__getitem__(name)

    model = network()
    before, text = snapshot(model), repr(model)
    with pytest.raises(torch.OutOfMemoryError):
        install(model, PLAN, NoRoom(new_tensors(model)))
    assert untouched(model, before) and repr(model) == text and model[0].bias is None


def test_the_layer_itself_may_be_the_network() -> None:
    layer = nn.Linear(3, 2, bias=False)
    plan = SlimmingPlan({"weight": (2, 3)}, {"weight": {1: (0, 2)}}, biases=("",))
    undo = install(layer, plan, {"weight": plan.cut("weight", layer.weight), "bias": torch.tensor([1.0, 2.0])})
    assert layer.in_features == 2 and layer.bias.tolist() == [1, 2]
    undo()
    assert layer.bias is None and layer.in_features == 3


@pytest.mark.parametrize("number", [True, False])
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 1, 2)])
def test_entries_are_overwritten_and_put_back(shape: tuple[int, ...], number: bool) -> None:
    for entries in (
        torch.rand(shape) < 0.3,
        torch.zeros(shape, dtype=torch.bool),
        (torch.arange(shape[-1]) < 1).expand(shape),
    ):
        tensor, values = nn.Parameter(torch.randn(shape)), torch.randn(shape)
        before = tensor.detach().clone()
        put_back = overwrite(tensor, entries, 0.5 if number else values.double())
        assert torch.equal(tensor, torch.where(entries, 0.5 if number else values, before))
        put_back()
        assert torch.equal(tensor, before)
