"""Files are whole, or what was there before."""

import os
import resource
import signal
import time

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from lightning_fscreen import load_slimmed, save_slimmed
from lightning_fscreen.cli.figures import save_figures
from lightning_fscreen.cli.outputs import write_outputs
from lightning_fscreen.files import is_torch_save, replacing
from lightning_fscreen.saving.onnx import export_onnx
from tests.conftest import mlp


def raises_on_a_full_disk(write):
    """Whether it raises OSError where no file can grow beyond 500 bytes; in a process of its own, for pytest writes."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        try:
            write()
        except OSError:
            os._exit(7)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


WRITERS = {
    "model.safetensors": lambda folder: save_slimmed(mlp(), folder / "model.safetensors"),
    "report.json": lambda folder: write_outputs(folder, {"text": "x" * 1000}, torch.nn.Linear(1, 1)),
    "model.onnx": lambda folder: export_onnx(mlp(), (torch.zeros(2, 64),), folder / "model.onnx"),
    "figure.png": lambda folder: save_figures({"figure": Figure()}, folder),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_full_disk_leaves_what_was_there(name, tmp_path):
    if name == "model.onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    (tmp_path / name).write_bytes(b"before")
    assert raises_on_a_full_disk(lambda: WRITERS[name](tmp_path))
    assert (tmp_path / name).read_bytes() == b"before"
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_folder_that_is_not_there_is_named(name, tmp_path):
    if name == "figure.png":
        pytest.skip("makes it")
    if name == "model.onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        WRITERS[name](tmp_path / "nowhere")


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_kill_leaves_one_whole_model(tmp_path):
    path = tmp_path / "model.safetensors"
    networks = [mlp(hidden=200), mlp(hidden=200)]
    save_slimmed(networks[0], path)
    for moment in range(20):
        child = os.fork()
        if child == 0:
            while True:
                for network in networks:
                    save_slimmed(network, path)
        time.sleep(0.01 + 0.003 * moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = load_slimmed(mlp(hidden=200), path)
        assert any(torch.equal(loaded[1].weight, network[1].weight) for network in networks)


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_a_header_of_safetensors_may_be_as_long_as_a_pickle_begins(length, tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "short", metadata={"": ""})
    rest = length - int.from_bytes((tmp_path / "short").read_bytes()[:8], "little")
    save_file({"weight": torch.ones(2)}, tmp_path / "file", metadata={"": "a" * rest})
    assert (tmp_path / "file").read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")
    assert not is_torch_save(tmp_path / "file")


@pytest.mark.parametrize("archive", [False, True])
def test_files_of_torch_are_known(archive, tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "file", _use_new_zipfile_serialization=archive)
    assert is_torch_save(tmp_path / "file")
