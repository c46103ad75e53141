"""Damaged and hostile files: an error or the saved model, never a crash, a hang or a wrong model.

FSCREEN_FUZZ=10000 for more cases.
"""

import contextlib
import json
import os
import random
import resource
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_fscreen import load_slimmed, save_slimmed, slim
from lightning_fscreen.saving.packed import MASKS, unpack
from lightning_fscreen.saving.slimmed import digest
from lightning_fscreen.slimming import PlanError

CASES = int(os.environ.get("FSCREEN_FUZZ", "2000"))
SECONDS = 5  # for one file
MEGABYTES = 200  # for all of them


class Small(nn.Module):
    """A depthwise convolution, a channel select, a bias that slimming adds, a layer that is mostly zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.norm2 = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)
        self.point, self.sparse = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(4, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.norm(h).relu()
        return self.sparse(self.point(self.norm2(self.depthwise(h)).sigmoid()))


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    network = Small()
    nn.init.normal_(network.norm2.bias)
    nn.init.sparse_(network.sparse.weight.data.view(10, -1), 0.9)
    keep = {"norm": torch.arange(6) > 1, "norm2": torch.arange(6) < 4}
    plan = slim(network, keep, torch.randn(2, 1, 8, 8), "fold")
    assert plan.cuts and plan.groups and plan.biases
    save_slimmed(network, folder / "saved.safetensors")
    return folder / "saved.safetensors"


def flipped(data: bytes, rng: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def header_flipped(data: bytes, rng: random.Random) -> bytes:
    size = 8 + struct.unpack("<Q", data[:8])[0]
    return flipped(data[:size], rng) + data[size:]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def spliced(data: bytes, rng: random.Random) -> bytes:
    first, second, third = sorted(rng.randrange(len(data)) for _ in range(3))
    parts = [data[:first], data[first:second], data[second:third], data[third:]]
    return b"".join(rng.choice([parts, parts[::-1], [parts[0], parts[3]], [*parts, parts[1]], parts[1:]]))


def hostile_size(data: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(10**6)])) + data[8:]


def hostile_header(data: bytes, rng: random.Random) -> bytes:
    """The header rewritten: huge or negative shapes and offsets, other types, other names."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    value = rng.choice([-1, 0, 2**31, 2**62, 10**30, "1", None, [1], 1.5, [2**40, 2**40]])
    change = rng.randrange(5)
    if change == 0:
        header[name]["shape"] = rng.choice([[value], [2**40, 2**40], [], [0], header[name]["shape"] * 50])
    elif change == 1:
        header[name]["data_offsets"] = rng.choice([[0, value], [value, 0], [0, len(data) * 2], [5, 3]])
    elif change == 2:
        header[name]["dtype"] = rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "nothing", value])
    elif change == 3:
        header[rng.choice(["__proto__", "norm.weight", "../x", "x" * 10**5])] = header.pop(name)
    else:
        header["__metadata__"] = rng.choice(
            [None, {}, value, {"fscreen": "{}"}, {"fscreen_plan": "["}, {"fscreen": "[" * 9999}]
        )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plan and tensors of a file."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fscreen"])
    return json.loads(about["plan"]), unpack(load_file(path), about["packed"])


def hostile_plan(path: Path, rng: random.Random) -> bytes:
    """Another plan with the right checksum, from somebody who means it."""
    plan, tensors = contents(path)
    key = rng.choice(list(plan))
    value = rng.choice(
        [None, -1, 2**70, "x", [], {}, [[]], {"": 1}, {"stem": -1}, {"stem.weight": {"0": [2**70]}}, ["stem"] * 1000]
    )
    if isinstance(plan[key], dict) and plan[key] and rng.random() < 0.7:
        name = rng.choice(list(plan[key]))
        plan[key][rng.choice([name, "norm", "stem.weight", ""])] = rng.choice(
            [value, [0], [5, 4], [0, 0], [-1], {"0": [0, 1]}, {"7": [0]}, {"-1": [0]}, {"x": []}, list(range(10**5)), 3]
        )
    else:
        plan[key] = value
    text = rng.choice(
        [json.dumps(plan), json.dumps(plan), json.dumps(plan)[: rng.randrange(50)], "[" * 10**5, "9" * 10**5]
    )
    target = path.with_name("hostile.safetensors")
    save_file(tensors, target, metadata={"fscreen_plan": text, "fscreen_sha256": digest(text, tensors)})
    return target.read_bytes()


def changed(value: Any, rng: random.Random) -> Any:
    """A number, an index list or a cut that is nearly the same."""
    if isinstance(value, int):
        return rng.choice([value - 1, value + 1, 0, 1])
    if isinstance(value, list):
        shifted = sorted(rng.sample(range(max(value) + 2), len(value)))
        return rng.choice([value[1:], [*value, value[-1] + 1], shifted])
    dim = rng.choice(list(value))
    return rng.choice([{dim: changed(value[dim], rng)}, {str(1 - int(dim)): value[dim]}])


def edited_plan(path: Path, rng: random.Random) -> bytes:
    """Some entries dropped, added or altered, as somebody would who tries things out; the checksum made anew."""
    plan, tensors = contents(path)
    names = [*tensors, *(name for name, _ in Small().named_modules())]
    for _ in range(rng.choice([1, 1, 2, 3])):
        part = plan[rng.choice(["shapes", "cuts", "groups", "biases", "selects", "removed"])]
        if isinstance(part, list):
            part.append(rng.choice(names)) if rng.random() < 0.5 else part.clear()
        elif part:
            name = rng.choice(list(part))
            kind = rng.randrange(3)
            new = changed(part[name], rng) if kind == 0 else part[name]
            if kind == 1:
                del part[name]
            part[name if kind == 0 else rng.choice(names)] = new
            if kind == 1 and rng.random() < 0.5:
                part.popitem()
    text = json.dumps(plan)
    target = path.with_name("edited.safetensors")
    save_file(tensors, target, metadata={"fscreen": json.dumps({"plan": text, "sha256": digest(text, tensors)})})
    return target.read_bytes()


def hostile_masks(path: Path, rng: random.Random) -> bytes:
    """Shapes, masks and values of packed tensors that do not fit, or that fit another tensor."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fscreen"])
    tensors, shapes = load_file(path), about["packed"]
    assert shapes
    value = rng.choice(
        [None, "x", [-1], [2**62], [2**40, 2**40], [0], [], [[4]], {"0": 4}, [360], [9, 40], [1.5], [10**9]]
    )
    change = rng.randrange(4)
    if change == 0:
        about["packed"] = value
    elif change == 1:
        about["packed"][rng.choice([*tensors, "sparse.weight", "nothing"])] = value
    elif change == 2:
        masks = tensors[MASKS].clone()
        masks[rng.randrange(len(masks))] ^= 1 << rng.randrange(8)
        tensors[MASKS] = rng.choice([masks, masks.float(), masks[1:], masks.repeat(2), masks[None], masks.flip(0)])
    else:
        values = tensors["sparse.weight"]
        tensors["sparse.weight"] = rng.choice(
            [values[1:], values.flip(0), values[None], values.double(), values.cfloat()]
        )
    target = path.with_name("masks.safetensors")
    save_file(tensors, target, metadata={"fscreen": json.dumps(about)})
    return target.read_bytes()


OF_FILES = (hostile_plan, edited_plan, hostile_masks)
MUTATIONS = (flipped, header_flipped, truncated, spliced, hostile_size, hostile_header, *OF_FILES)


@contextlib.contextmanager
def at_most(seconds: int):
    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_no_damaged_file_gives_a_wrong_model(mutate, tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    expected, x = load_slimmed(Small(), path).eval(), torch.randn(2, 1, 9, 9)
    output, fresh = expected(x), Small()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    rng = random.Random(0)
    refused = 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(CASES // len(MUTATIONS) + 1):
        mutated = mutate(path if mutate in OF_FILES else data, rng)
        target = tmp_path / "mutated.safetensors"
        target.write_bytes(mutated)
        model = fresh
        with at_most(SECONDS):
            try:
                load_slimmed(model, target)
            except PlanError:
                refused += 1
                state = model.state_dict()
                assert all(torch.equal(state[name], tensor) for name, tensor in before.items()), case
            else:
                assert torch.equal(model.eval()(x), output), case
                fresh = Small()
                before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    assert refused > CASES // len(MUTATIONS) // 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1024 * MEGABYTES
