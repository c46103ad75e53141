"""A failed command ends with one line, and the traceback is where that line's neighbour says."""

import pytest
from hydra.utils import instantiate

from lightning_fscreen.cli.errors import describe, in_one_line
from tests.cli.test_run import QUIET, fscreen


def test_a_corrupt_image_is_the_last_line(tmp_path, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # CI wants to see everything
    for part in ("train", "test"):
        for name in ("cat", "newt"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(b"no image")
    options = ["data=image_folder", "data.root=images", "data.image_size=8", "hydra.run.dir=run"]
    done = fscreen(tmp_path, *options, *QUIET, status=1)
    assert "Traceback" not in done.stderr
    *_, where, line = done.stderr.strip().splitlines()
    assert line.startswith(f"fscreen: error: {tmp_path}/images/train/cat/1.png cannot be read as an image (")
    assert line.endswith("): replace or delete it")
    assert where.endswith("run/fscreen.log, and shown with HYDRA_FULL_ERROR=1.")
    assert "Traceback" in (tmp_path / "run" / "fscreen.log").read_text()


def test_the_traceback_is_shown_on_request(monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(KeyError, match="label"), in_one_line():
        raise KeyError("label")
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    with pytest.raises(SystemExit) as error, in_one_line():
        raise KeyError("label")
    assert error.value.code == 1
    assert capsys.readouterr().err.endswith("HYDRA_FULL_ERROR=1.\nfscreen: error: KeyError: 'label'\n")


def test_an_object_that_cannot_be_made_gives_the_reason_and_its_place():
    node = {"model": {"net": {"_target_": "lightning_fscreen.FStatistic", "num_features": 0, "num_classes": 3}}}
    with pytest.raises(Exception) as error:
        instantiate(node)
    assert describe(error.value) == f"{error.value.__cause__} (configuration: model.net)"
    assert "num_features" in describe(error.value) and "\n" not in describe(error.value)
