from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from lightning_fscreen.modules import coupled_layers, evaluating, is_transposed_linear, num_inputs


def test_num_inputs_of_every_kind_of_layer():
    assert [num_inputs(m) for m in (nn.Linear(5, 3), nn.Conv2d(4, 6, 1, groups=2), nn.ConvTranspose1d(3, 2, 1))] == [
        5,
        4,
        3,
    ]
    assert num_inputs(nn.BatchNorm2d(7)) == 7
    with pytest.raises(TypeError, match="ReLU"):
        num_inputs(nn.ReLU())


def test_layers_are_grouped_by_the_units_that_they_share() -> None:
    units = {"a": [0, 1], "b": [2, 3], "c": [3, 1], "d": [-1, 5], "e": [-1, 6], "f": []}
    assert coupled_layers(units) == [["a", "b", "c"], ["d"], ["e"], ["f"]]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_layer_is_looked_at_like_any_other() -> None:
    assert not is_transposed_linear(torch.jit.script(nn.Linear(2, 3)))


class Merging(nn.Module):
    """Adapters fold their update into a weight for eval mode, and take it out again."""

    def __init__(self, merged: bool = False) -> None:
        super().__init__()
        self.merged = merged

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        self.merged = not mode
        return self


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_put_back_and_modules_that_do_more_are_told(fails: bool) -> None:
    parts = Merging(), Merging(), nn.Linear(2, 2), nn.Dropout()
    outer = Merging()
    outer.parts = nn.ModuleList(parts)
    parts[1].eval()
    parts[3].training = False
    before = [(module.training, getattr(module, "merged", None)) for module in outer.modules()]
    with contextlib.suppress(RuntimeError), evaluating(outer):
        assert not any(module.training for module in outer.modules()) and parts[0].merged
        if fails:
            raise RuntimeError
    assert [(module.training, getattr(module, "merged", None)) for module in outer.modules()] == before
