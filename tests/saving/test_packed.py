"""Packed tensors come back to the bit, and take the room that the arithmetic says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lightning_fscreen import load_slimmed, save_slimmed
from lightning_fscreen.models import lenet300_100
from lightning_fscreen.saving.packed import MASKS, pack, unpack
from lightning_fscreen.slimming import PlanError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 20), max_size=3), st.floats(0, 1)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 99),
)
def test_everything_comes_back_to_the_bit(cases: list[tuple[torch.dtype, list[int], float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, (dtype, shape, zeros) in enumerate(cases):
        values = torch.randn(shape, generator=generator)
        values = torch.where(torch.rand(shape, generator=generator) < zeros, 0.0, values)
        special = torch.tensor([-0.0, torch.nan, 1e-30, 1.0])
        if values.numel() > 8:
            values.view(-1)[:4] = special
        tensors[f"{index}.weight"] = values.to(dtype)
    stored, shapes = pack(tensors)
    again = unpack(stored, shapes)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert sum(tensor.nbytes for tensor in stored.values()) <= sum(tensor.nbytes for tensor in tensors.values())


def test_what_would_not_become_smaller_is_stored_as_it_is() -> None:
    tensors = {"dense": torch.ones(100, 100), "small": torch.zeros(8, 8), "sparse": torch.eye(100)}
    stored, shapes = pack(tensors)
    assert shapes == {"sparse": [100, 100]} and stored["dense"] is tensors["dense"] and len(stored["sparse"]) == 100
    assert pack({"dense": torch.ones(50, 50)})[0].keys() == {"dense"}
    assert not pack({MASKS: torch.ones(3), "sparse": torch.eye(100)})[1]  # whoever has such a name


def test_lenet_at_98_percent_takes_under_60_kilobytes(tmp_path: Path) -> None:
    """Even if no unit has died, so that no tensor is smaller."""
    torch.manual_seed(0)
    network = lenet300_100().eval()
    with torch.no_grad():
        for weight in (parameter for parameter in network.parameters() if parameter.ndim > 1):
            weight[weight.abs() <= weight.abs().flatten().kthvalue(round(0.98 * weight.numel())).values] = 0
    images = torch.randn(4, 1, 28, 28)
    save_slimmed(network, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size < 60_000
    again = load_slimmed(lenet300_100(), tmp_path / "net.safetensors").eval()
    for (name, tensor), other in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert torch.equal(again(images), network(images))


def test_dense_networks_are_plain_safetensors(tmp_path: Path) -> None:
    network = nn.Linear(30, 40)
    save_slimmed(network, tmp_path / "net.safetensors")
    assert torch.equal(load_file(tmp_path / "net.safetensors")["weight"], network.weight)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, "not of which shapes: None"),
        ({"a": [-1]}, "not of which shapes"),
        ({"a": [2**70]}, "the file has 1250"),
        ({"a": [100, 99]}, "the file has 1250"),
        ({"b": [100, 100]}, "'b' has 100 values by its mask, the file has none"),
        ({"c": [100, 100]}, r"'c' has 100 values by its mask, the file has \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: object, message: str) -> None:
    stored, _ = pack({"a": torch.eye(100)})
    with pytest.raises(PlanError, match=message):
        unpack(stored | {"c": torch.zeros(3)}, shapes)
