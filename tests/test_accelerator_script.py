import json

import pytest

from tests.benchmarks import accelerator
from tests.processes import Forked


def finished(folder):
    return [json.loads(line) for line in (folder / "pieces.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_script_for_the_first_accelerator_works_in_miniature(tmp_path, monkeypatch):
    """Stopped after every piece: each is done once. (Tests marked `cuda` have a line, whatever became of them.)"""
    monkeypatch.setattr("subprocess.Popen", Forked)  # the commands are the same, what they import is there
    arguments = ["accelerator.py", str(tmp_path), "--miniature"]
    monkeypatch.setattr("sys.argv", [*arguments, "--once"])
    accelerator.main()
    assert [line["name"] for line in finished(tmp_path)] == ["tests"]
    monkeypatch.setattr("sys.argv", arguments)
    accelerator.main()
    lines = {line["name"]: line["result"] for line in finished(tmp_path)}
    assert len(lines) == len(finished(tmp_path)) == 4
    assert not [line for line in lines.values() if "error" in line], lines
    assert {"without", "masks", "idle", "gathering", "slim"} <= lines["steps/resnet50/bf16-mixed/eager"].keys()
    table = lines["table/resnet164_cifar10/cls"]["report"]
    assert table["amount"] == 0.6 and table["params"]["after"] < table["params"]["before"]


def test_a_training_that_takes_longer_goes_on_where_it_stopped(tmp_path, monkeypatch):
    class Options:
        folder, minutes = str(tmp_path), 0.003

    slow = ["sleep", "9"]
    assert accelerator.run_piece("table/a/dense", slow, Options) is None
    assert "took more than" in accelerator.run_piece("steps/a", slow, Options)["error"]
