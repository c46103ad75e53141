"""Files of JSON lines, to which the metrics of runs are added."""

import json

import pytest

from lightning_fscreen.saving.lines import Runs, read_lines


def test_a_run_that_is_there_is_not_repeated(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert Runs(path).metric("a", lambda: 0.5, layers=["x"]) == 0.5
    assert Runs(path).metric("a", lambda: 1 / 0) == 0.5
    assert Runs(path).metric("b", lambda: 0.25) == 0.25
    assert read_lines(path) == [{"run": "a", "layers": ["x"], "metric": 0.5}, {"run": "b", "metric": 0.25}]
    assert [file.name for file in tmp_path.iterdir()] == ["runs.jsonl"]
    assert Runs(None).metric("a", lambda: 1.0) == 1.0 and read_lines(tmp_path / "none") == []


@pytest.mark.parametrize("line", ["{", "3", json.dumps({"run": "a"}), json.dumps({"run": "a", "metric": None})])
def test_damaged_files_are_named(line, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{{"run": "a", "metric": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*runs.jsonl is no JSON|runs.jsonl has lines without a run"):
        Runs(path)
    assert path.read_text().endswith(f"{line}\n")
