from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import PruningReport
from lightning_fscreen.costs.size import Size, measure_size
from lightning_fscreen.fit.report import LayerReport
from tests.slimming import snapshot, untouched


@pytest.mark.parametrize(
    ("network", "shape", "params", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 7 * 5 + 5, 7 * 5),
        (nn.Linear(7, 5, bias=False), (3, 4, 7), 7 * 5, 4 * 7 * 5),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 6), 3 * 8 * 9 + 8, 10 * 6 * 3 * 8 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), (2, 3, 11, 9), 3 * 8 * 9 + 8, 5 * 4 * 3 * 8 * 9),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5), 6 * 9, 9 * 6 * 9),
        (nn.Conv1d(4, 6, 5), (1, 4, 9), 4 * 6 * 5 + 6, 5 * 4 * 6 * 5),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), 2 * 3 * 8 + 3, 27 * 2 * 3 * 8),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (5, 4), 4 * 6 + 6 + 6 * 2 + 2, 4 * 6 + 6 * 2),
        (nn.ReLU(), (2, 3), 0, 0),
    ],
)
def test_size_agrees_with_counting_by_hand(network: nn.Module, shape: tuple[int, ...], params: int, macs: int) -> None:
    size = measure_size(network, ((torch.randn(shape),), {}), shape[0])
    assert (size.params, size.macs) == (params, macs)


def test_nonzero_parameters_are_counted() -> None:
    network = nn.Linear(4, 3)
    with torch.no_grad():
        network.weight[:, 1:3] = 0
        network.bias.zero_()
    assert measure_size(network, None, 2) == Size(params=15, nonzero=6, macs=None)


def test_shared_parameters_count_once_and_their_work_twice() -> None:
    layer = nn.Linear(4, 4)
    size = measure_size(nn.Sequential(layer, nn.ReLU(), layer), ((torch.randn(2, 4),), {}), 2)
    assert (size.params, size.macs) == (20, 32)


def test_keyword_inputs_are_passed() -> None:
    class Keyword(nn.Linear):
        def forward(self, *, x: Tensor) -> Tensor:
            return super().forward(x)

    assert measure_size(Keyword(3, 2), ((), {"x": torch.randn(4, 3)}), 4).macs == 6


def test_measuring_changes_nothing() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    network[1].eval()
    before, state = snapshot(network), torch.get_rng_state()
    measure_size(network, ((torch.ones(5, 3),), {}), 5)
    assert untouched(network, before) and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in network.parameters())


def report(**changes: object) -> PruningReport:
    fields: dict[str, object] = {
        "granularity": "weight",
        "layers": (LayerReport("net.0", 100, 20), LayerReport("net.2", 50, 10)),
        "before": Size(160, 160, 150),
        "after": Size(61, 40, 31),
        "removed": {"net.0": 3},
        "not_pruned": {"net.3": "frozen"},
    }
    return PruningReport(**{**fields, **changes})  # type: ignore[arg-type]


def test_totals() -> None:
    made = report()
    assert (made.total, made.kept) == (150, 30)
    assert made.pruned_fraction == pytest.approx(0.8)


def test_to_dict_is_json_with_the_keys_of_the_contract() -> None:
    data = json.loads(json.dumps(report(not_removed="cannot be captured").to_dict()))
    assert data["candidates"] == {"total": 150, "kept": 30, "pruned_fraction": pytest.approx(0.8)}
    assert {key: data["params"][key] for key in ("before", "after")} == {"before": 160, "after": 61}
    assert data["macs"] == {"before": 150, "after": 31}
    assert data["layers"] == [
        {"name": "net.0", "total": 100, "kept": 20, "dead": 0},
        {"name": "net.2", "total": 50, "kept": 10, "dead": 0},
    ]
    assert data["granularity"] == "weight" and data["removed"] == {"net.0": 3}
    assert data["not_pruned"] == {"net.3": "frozen"} and data["not_removed"] == "cannot be captured"


def test_unknown_operations_are_none() -> None:
    data = report(before=Size(1, 1, None), after=Size(1, 1, None)).to_dict()
    assert json.loads(json.dumps(data))["macs"] == {"before": None, "after": None}


def test_a_real_measurement_can_be_written() -> None:
    size = measure_size(nn.Linear(3, 2), ((torch.randn(2, 3),), {}), 2)
    data = json.loads(json.dumps(report(before=size, after=size).to_dict()))
    assert data["params"]["before"] == 8 and data["macs"]["after"] == 6
