"""Times of operations: measured once, kept in a file by device."""

import json
import logging

import pytest
import torch

from lightning_fscreen import Latency
from lightning_fscreen.costs.timings import Operation, Timings

CPU = torch.device("cpu")


def product(size):
    matrix = torch.empty(size, size, device="meta")
    return Operation(torch.ops.aten.mm.default, (matrix, matrix), {})


def test_more_work_takes_longer_and_nothing_is_measured_twice(monkeypatch):
    timings = Timings(Latency(), CPU)
    small, large = timings.of(product(8)), timings.of(product(512))
    assert 0 < small < large and timings.overhead() < large
    monkeypatch.setattr(Timings, "_measured", None)
    assert (timings.of(product(8)), timings.of(product(512))) == (small, large)
    again = Timings(Latency(), CPU, timings.state_dict())
    assert again.of(product(512)) == large


def test_those_that_are_asked_for_together_are_measured_in_turns(monkeypatch):
    asked = []

    def measured(self, operation):
        asked.append(operation.args[0].shape[0])
        return 100.0 / len(asked)

    monkeypatch.setattr(Timings, "_measured", measured)
    timings = Timings(Latency(), CPU)
    with timings.together():
        assert (timings.of(product(8)), timings.of(product(9)), timings.of(product(8))) == (0, 0, 0)
    assert asked[:4] == [8, 9, 8, 9] and set(asked) == {8, 9}
    rounds = len(asked) // 2
    assert (timings.of(product(8)), timings.of(product(9))) == (100 / (2 * rounds - 1), 50 / rounds)  # the shortest


def test_random_numbers_and_the_number_of_threads_stay():
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    ids = torch.empty(4, 6, dtype=torch.int64, device="meta")
    table = torch.empty(9, 3, device="meta")
    assert Timings(Latency(), CPU).of(Operation(torch.ops.aten.embedding.default, (table, ids), {})) > 0
    dropout = Operation(torch.ops.aten.dropout.default, (table, 0.5, True), {})
    assert Timings(Latency(), CPU).of(dropout) > 0
    assert torch.equal(before, torch.random.get_rng_state()) and torch.get_num_threads() == threads


def test_a_file_keeps_the_times_of_several_devices(tmp_path, monkeypatch):
    path = tmp_path / "new" / "times.json"
    timings = Timings(Latency(table=path), CPU)
    time = timings.of(product(8))
    timings.keep()
    (name,) = json.loads(path.read_text())
    assert name.startswith("cpu: ") and torch.__version__ in name
    path.write_text(json.dumps({"cuda: other": {"x": 1.0}, **json.loads(path.read_text())}))
    other = Timings(Latency(table=path), CPU)
    other.of(product(9))
    other.keep()
    assert list(path.parent.iterdir()) == [path]
    found = json.loads(path.read_text())
    assert len(found) == 2 and len(found[name]) == 2
    monkeypatch.setattr(Timings, "_measured", None)
    assert Timings(Latency(table=path), CPU).of(product(8)) == time


@pytest.mark.parametrize(
    "text", ["no JSON", "[1]", '{"cpu": 3}', '{"cpu": {"x": "slow"}}', '{"cpu": {"x": NaN}}', '{"cpu": {"x": -1}}']
)
def test_another_file_is_refused_and_stays(tmp_path, text):
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes.json' is no table of latencies .* name another file"):
        Timings(Latency(table=path), CPU)
    assert path.read_text() == text


def test_what_cannot_be_timed_counts_as_nothing_and_is_named(caplog):
    odd = Operation(torch.ops.aten.mm.default, (torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")), {})
    with caplog.at_level(logging.WARNING):
        assert Timings(Latency(), CPU).of(odd) == 0
    assert "operation aten.mm.default(float32[2, 3], float32[2, 3]) cannot be timed" in caplog.text


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_a_batch_has_instances(size):
    with pytest.raises(ValueError, match="batch_size of latency must be a whole number from 1 on"):
        Latency(size)


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_the_device_has_to_be_there(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not there; name one that is, or none: "):
        Latency(device=device)
