from __future__ import annotations

import json
import sys
from dataclasses import astuple

import pytest
import torch
from torch import nn

from lightning_fscreen import PruningReport
from lightning_fscreen.costs.size import LayerSize, Size, measure_size
from lightning_fscreen.fit.report import LayerReport, Record


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


SIZES = {
    "before": Size(
        160, 160, 150, {"net.0": LayerSize(110, 100), "net.1": LayerSize(10, 0), "net.2": LayerSize(40, 50)}
    ),
    "after": Size(61, 40, 31, {"net.0": LayerSize(40, 20), "net.2": LayerSize(21, 11)}),
}


def test_it_prints_as_a_table_of_the_layers() -> None:
    reasons = {"net.1": "frozen", "net.3": "left out", "net.4": "frozen"}
    evidence = {"trusted": "no feature stands out"}
    layers = LayerReport("net.0", 100, 20, evidence), LayerReport("net.2", 50, 10, {"trusted": None})
    text = str(report(layers=layers, not_pruned=reasons, not_removed="it is <odd>", **SIZES))
    assert [line.split() for line in text.splitlines()] == [
        "30 of 150 weights kept (20.00 %); 40 of the network's 61 parameters are not zero".split(),
        [],
        "layer weights kept parameters multiply–adds units removed".split(),
        ["─" * width for width in (5, 8, 7, 10, 13, 13)],
        "net.0 100 → 20 20.00 % 110 → 40 100 → 20 3".split(),
        "net.1 – – 10 → 0 0 –".split(),
        "net.2 50 → 10 20.00 % 40 → 21 50 → 11 –".split(),
        "net.3 – – 0 0 –".split(),
        "net.4 – – 0 0 –".split(),
        ["─" * width for width in (5, 8, 7, 10, 13, 13)],
        "all 150 → 30 20.00 % 160 → 61 150 → 31 3".split(),
        *([], ["not", "pruned:"], "frozen: net.1, net.4".split(), "left out: net.3".split()),
        *([], "not physically removed:".split(), "it is <odd>".split()),
        *([], "ranked by magnitude alone:".split(), "no feature stands out: net.0".split()),
    ]


def test_a_notebook_shows_the_same_and_escapes_names() -> None:
    assert len(repr(report(**SIZES))) < 120
    html = report(not_removed="it is <odd>", **SIZES)._repr_html_()
    assert html.count("<tr>") == 1 + 4 + 1 and "it is &lt;odd&gt;" in html and "<odd>" not in html


def test_to_json_has_the_sizes_of_the_layers() -> None:
    data = json.loads(report(**SIZES).to_json())
    assert data["modules"][1] == {
        "name": "net.1",
        "params": {"before": 10, "after": 0},
        "macs": {"before": 0, "after": 0},
    }


def test_to_pandas_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report().to_pandas()


def test_to_pandas_has_a_line_for_every_layer() -> None:
    pytest.importorskip("pandas")
    frame = report(**SIZES).to_pandas()
    assert frame.index.name == "layer" and list(frame.index) == ["net.0", "net.1", "net.2", "net.3"]
    assert list(frame["kept"].dropna()) == [20, 10] and frame.loc["net.0", "macs_after"] == 20
    assert frame.loc["net.3", "not_pruned"] == "frozen"


def test_sizes_survive_a_checkpoint_also_those_of_earlier_versions_without_layers() -> None:
    old, new = Record([8, 7, 6], {}), Record(list(astuple(SIZES["before"])), {})
    assert old.before == Size(8, 7, 6) and not old.before.layers
    assert new.before.layers == SIZES["before"].layers
    assert "–" in str(report(before=old.before, after=old.after))
