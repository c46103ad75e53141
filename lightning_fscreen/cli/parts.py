"""The parts of a composed configuration: its data, its callbacks, the network in its model, the folder of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig
from torch import nn

from lightning_fscreen.cli.filling import fit_to_data, has_open_values, leave_out_unknown


def data_of(config: DictConfig, first: bool = True) -> LightningDataModule:
    """The data module; what the data determines is filled into the configuration.

    Args:
        config: of a run.
        first: whether this process prepares the data.
    """
    leave_out_unknown(config)
    data: LightningDataModule = instantiate(config.data, _convert_="all")
    if has_open_values(config):  # otherwise the Trainer does it
        if first:
            data.prepare_data()
        data.setup("fit")
    fit_to_data(config, data)
    return data


def network_of(model: LightningModule) -> nn.Module:
    """What is reported and saved: the module's `net`, if it has one, else the module itself."""
    net = getattr(model, "net", None)
    return net if isinstance(net, nn.Module) else model


def check_writable(folder: Path) -> None:
    """Make the run folder, and make sure that files can be written there.

    Raises:
        OSError: they cannot; names the folder and the override that moves it.
    """
    probe = folder / ".fscreen_write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(
            f"the run folder {str(folder)!r} cannot be written ({error.strerror}); "
            "choose another with hydra.run.dir=FOLDER (hydra.sweep.dir=FOLDER for sweeps)"
        ) from error


def instantiate_all(entries: DictConfig | None) -> list[Any]:
    """Objects of a group of named entries; what an experiment adds to an entry that is not there is left out."""
    return [instantiate(entry, _convert_="all") for entry in (entries or {}).values() if "_target_" in entry]
