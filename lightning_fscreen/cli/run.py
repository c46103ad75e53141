"""`fscreen`: train, screen, prune, slim, test and report, configured by Hydra."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_fscreen.callback import ScreeningPruningCallback
from lightning_fscreen.cli.errors import in_one_line
from lightning_fscreen.cli.explaining import explain_run
from lightning_fscreen.cli.outputs import (
    latency_report,
    print_config,
    print_report,
    run_report,
    write_figures,
    write_outputs,
)
from lightning_fscreen.cli.parts import check_writable, data_of, instantiate_all, network_of
from lightning_fscreen.cli.resuming import EpochSeed, KeepMetrics, WholeCheckpoints
from lightning_fscreen.cli.weights import load_weights
from lightning_fscreen.files import replacing
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.saving.onnx import export_onnx

# Advice that means nothing here: data in memory need no workers, the run folder holds the configuration already, and
# ckpt_path=last is for the first time, too.
_NOISE = (
    "Checkpoint directory .* exists and is not empty",
    ".*there is no last checkpoint available",
    "The .*dataloader.* does not have many workers",
    "Experiment logs directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


def main() -> None:
    """Entry point of the command `fscreen`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for modules of the user's own: model._target_=my_module.MyModule
    command = _run_command
    if sys.argv[1:2] == ["explain"]:
        del sys.argv[1]  # what is left are overrides
        command = _explain_command
    hydra.main(version_base="1.3", config_path="pkg://lightning_fscreen.conf", config_name="train")(command)()


def _run_command(config: DictConfig) -> float | None:
    with in_one_line():
        return run(config)


def _explain_command(config: DictConfig) -> None:
    with in_one_line(), _without_noise(config):
        explain_run(config)


def run(config: DictConfig) -> float | None:
    """One run of a composed configuration; returns `optimized_metric` for a sweeper.

    Raises:
        ValueError: a configuration that does not fit together, an `optimized_metric` that was not logged.
        NotADirectoryError, PermissionError: the run folder cannot be written.
    """
    with _without_noise(config):
        return _run(config)


@contextlib.contextmanager
def _without_noise(config: DictConfig) -> Iterator[None]:
    with warnings.catch_warnings():
        for message in (".*",) if config.extras.ignore_warnings else _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def _run(config: DictConfig) -> float | None:
    start = time.perf_counter()
    folder = Path(config.paths.output_dir)
    check_writable(folder)
    seed_everything(config.seed, workers=True, verbose=False)

    first = getattr(rank_zero_only, "rank", 0) == 0  # children of a DDP run start again from here
    data = data_of(config, first)
    config.paths.output_dir = str(folder)  # the folder itself, where ${hydra:…} cannot be resolved any more
    if first:
        with replacing(folder / "config.yaml") as partial:
            OmegaConf.save(config, partial, resolve=True)
        if config.extras.print_config:
            print_config(config)

    model: LightningModule = instantiate(config.model, _convert_="all")
    network = network_of(model)
    if config.weights is not None:
        load_weights(model, config.weights, config.weights_exclude)
    callbacks, loggers = instantiate_all(config.callbacks), instantiate_all(config.logger)
    kept = KeepMetrics(folder)
    trainer: Trainer = instantiate(
        config.trainer, callbacks=[EpochSeed(config.seed), kept, *callbacks], logger=loggers, _convert_="all"
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    pruning = next((callback for callback in callbacks if isinstance(callback, ScreeningPruningCallback)), None)

    dense = copy.deepcopy(network) if config.extras.latency and pruning is not None and first else None
    called = _first_call(network)

    trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
    metrics: dict[str, Any] = kept.latest | trainer.callback_metrics
    if is_overridden("test_step", model) and is_overridden("test_dataloader", data):
        trainer.test(model, datamodule=data, verbose=False)
        metrics |= trainer.callback_metrics
    value = _optimized(config.optimized_metric, metrics)

    if trainer.is_global_zero:
        report = run_report(config, _experiment(), network, pruning, metrics, data)
        if dense is not None and called.inputs is not None:
            report["latency_ms"] = latency_report(dense, network, *called.inputs_on_device())
        report["seconds"] = round(time.perf_counter() - start, 3)
        write_outputs(folder, report, network)
        if config.extras.figures and pruning is not None:
            write_figures(folder / "figures", pruning, network, getattr(data, "image_shape", None))
        if config.extras.export_onnx:
            if called.inputs is None:
                raise ValueError(
                    "extras.export_onnx=true needs inputs, but the training never called "
                    f"{type(network).__name__} as a whole; let training_step call it, or the module's net"
                )
            args, kwargs = called.inputs_on_device()
            export_onnx(network, args, folder / "model.onnx", kwargs)
        if config.extras.print_report:
            print_report(report, pruning.report() if pruning else None, folder)
    return value


class RunFolderCheck(Callback):
    """Hydra callback: stops a run whose folder cannot be written, before Hydra itself stumbles over it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check `hydra.run.dir`."""
        self._check(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check `hydra.sweep.dir`."""
        self._check(Path(config.hydra.sweep.dir))

    def _check(self, folder: Path) -> None:
        try:
            check_writable(folder)
        except OSError as error:  # Hydra only warns of a callback's exceptions
            raise SystemExit(f"fscreen: {error}") from error


def _experiment() -> str | None:
    choice = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None
    return None if choice in (None, "none") else str(choice)


def _first_call(network: nn.Module) -> Network:
    """The network, and the inputs of its first call once that was made."""
    called = Network("", network)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.record(args, kwargs)
        handle.remove()

    handle = network.register_forward_pre_hook(record, with_kwargs=True)
    return called


def _optimized(name: str | None, metrics: dict[str, Any]) -> float | None:
    if name is None:
        return None
    if name not in metrics:
        raise ValueError(f"optimized_metric={name!r} was not logged; choose one of {sorted(metrics)}")
    return float(metrics[name])
