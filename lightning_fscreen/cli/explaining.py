"""`fscreen explain`: what the pruning of a configuration would do to its network at once, without any training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from lightning_fscreen.callback import ScreeningPruningCallback
from lightning_fscreen.cli.figures import save_figures
from lightning_fscreen.cli.layer_figures import units_figure
from lightning_fscreen.cli.parts import check_writable, data_of, instantiate_all, network_of
from lightning_fscreen.cli.weights import load_weights
from lightning_fscreen.files import replacing
from lightning_fscreen.slimming.state import resize_on_load
from lightning_fscreen.trained.arguments import Ranking
from lightning_fscreen.trained.explaining import Explanation, explain


def explain_run(config: DictConfig) -> Explanation:
    """Explain the network of a composed configuration: on the terminal, as a picture, and in explanation.json.

    Its callback's arguments are those of `explain`; those of its schedule, of masks and of training count for nothing
    here. The statistics are those of the training data, in one pass and without augmentation; the weights those of
    `ckpt_path` or `weights`, or those before any training.

    Raises:
        ValueError: no `ScreeningPruningCallback` in the configuration; as `explain`.
        FileNotFoundError: there is no such checkpoint, or file of weights.
        OSError: the run folder cannot be written.
    """
    folder = Path(config.paths.output_dir)
    check_writable(folder)
    seed_everything(config.seed, workers=True, verbose=False)
    data = data_of(config)
    callbacks = instantiate_all(config.callbacks)
    pruning = next((callback for callback in callbacks if isinstance(callback, ScreeningPruningCallback)), None)
    if pruning is None:
        raise ValueError("nothing prunes: there is no ScreeningPruningCallback in callbacks; leave callbacks=none out")
    model: LightningModule = instantiate(config.model, _convert_="all")
    if config.weights is not None:
        load_weights(model, config.weights, config.weights_exclude)
    if config.ckpt_path is not None:
        _load(model, folder / "checkpoints" / "last.ckpt" if config.ckpt_path == "last" else Path(config.ckpt_path))
    # It trains nothing, but data modules ask it for its state and its devices.
    one = {"devices": 1, "strategy": "auto", "precision": "32-true", "logger": False, "enable_checkpointing": False}
    data.trainer = trainer = cast(Trainer, instantiate(config.trainer, callbacks=[], **one, _convert_="all"))
    data.prepare_data()
    data.setup("fit")
    network = network_of(model.to(trainer.strategy.root_device))
    explanation = explain(
        model if network is model else _Inside(network),
        None,
        cast(Any, pruning.granularity),
        pruning.include,
        pruning.exclude,
        dataloader=_Batches(data, trainer.strategy.root_device),
        amount=pruning.amount,
        **cast(Ranking, {name: getattr(pruning, name) for name in Ranking.__annotations__}),
    )
    _write(explanation, folder, config.extras.figures)
    console = Console()
    source = config.ckpt_path or config.weights
    weights = f"of {source}" if source else "before any training"
    console.print(f"with the weights {weights}", style="italic", markup=False, soft_wrap=True)
    console.print(str(explanation), markup=False, highlight=False, soft_wrap=True)
    console.print(f"results: {folder}", markup=False, soft_wrap=True)
    return explanation


def _write(explanation: Explanation, folder: Path, figures: bool) -> None:
    """Write explanation.json and, if wanted, the picture of the units that every layer keeps."""
    with replacing(folder / "explanation.json") as partial:
        partial.write_text(explanation.to_json() + "\n")
    if figures and explanation.prediction is not None:
        layers = explanation.prediction.report.layers
        counts = [layer.name for layer in layers], [layer.total for layer in layers], [layer.kept for layer in layers]
        save_figures({"explanation": units_figure(*counts, "units")}, folder / "figures")


class _Inside(nn.Module):
    """A network under the name that it has in its LightningModule, so that patterns match as they do in a fit."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


class _Batches:
    """Batches of the training data as a network gets them in a Trainer that is not training: normalised, not more."""

    def __init__(self, data: LightningDataModule, device: torch.device) -> None:
        self._data, self._device = data, device

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data.train_dataloader():
            batch = self._data.on_before_batch_transfer(batch, 0)
            batch = self._data.transfer_batch_to_device(batch, self._device, 0)
            yield self._data.on_after_batch_transfer(batch, 0)


def _load(model: LightningModule, path: Path) -> None:
    """Load the weights of a checkpoint of any size."""
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path: there is no checkpoint {str(path)!r}; leave it out for untrained weights")
    stop = resize_on_load(model)
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    finally:
        stop()
