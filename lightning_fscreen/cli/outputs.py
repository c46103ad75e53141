"""The outputs of a run of `fscreen`: report.json, model.safetensors, figures, and tables on the terminal."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sized
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.tree import Tree
from torch import Tensor, nn

from lightning_fscreen.callback import ScreeningPruningCallback
from lightning_fscreen.candidates.granularity import GRANULARITIES
from lightning_fscreen.cli.figures import connections_figure, save_figures, schedule_figure, weights_figure
from lightning_fscreen.cli.layer_figures import layers_figure, units_figure
from lightning_fscreen.costs.latency import measure_latency
from lightning_fscreen.files import replacing
from lightning_fscreen.fit.report import PruningReport
from lightning_fscreen.ranking.schedule import scheduled_fraction
from lightning_fscreen.saving.slimmed import save_slimmed

_CURVE_POINTS = 200


def run_report(
    config: DictConfig,
    experiment: str | None,
    network: nn.Module,
    pruning: ScreeningPruningCallback | None,
    metrics: Mapping[str, Tensor],
    data: LightningDataModule,
) -> dict[str, Any]:
    """Contents of report.json, as primitives; without pruning, the sizes of the dense network."""
    size = sum(parameter.numel() for parameter in network.parameters())
    report: dict[str, Any] = {
        "experiment": experiment,
        "seed": config.seed,
        "granularity": pruning.granularity if pruning else None,
        "criterion": pruning.criterion if pruning else None,
        "screening_weight": pruning.screening_weight if pruning else None,
        "amount": pruning.amount if pruning else 0.0,
        "budget": pruning.budget if pruning else None,
        **{name.replace("/", "_"): round(float(metrics[name]), 7) for name in _REPORTED if name in metrics},
        "epochs": config.trainer.max_epochs,
        "train_size": _size(data.train_dataloader()),
        "params": {"before": size, "after": size},
        "layers": [],
    }
    if pruning is not None:
        report |= pruning.report().to_dict()
    return report | {
        "versions": {name: version(name) for name in ("lightning-fscreen", "torch", "lightning")}
        | {"python": platform.python_version()}
    }


def _size(loader: Any) -> int | None:
    """Instances of a loader's data set; None where nobody knows, as of a stream or of several loaders."""
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def latency_report(
    dense: nn.Module, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Milliseconds of a forward pass before and after, by batch size."""
    before = measure_latency(dense.to(next(network.parameters())), args, kwargs)
    after = measure_latency(network, args, kwargs)
    return {str(size): {"before": round(before[size], 4), "after": round(after[size], 4)} for size in before}


_REPORTED = ("test/error", "test/loss", "val/error", "val/loss", "train/loss")


def write_outputs(folder: Path, report: Mapping[str, Any], network: nn.Module) -> None:
    """Write report.json and model.safetensors, each beside its place and renamed."""
    save_slimmed(network, folder / "model.safetensors")
    with replacing(folder / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")


def write_figures(
    folder: Path,
    pruning: ScreeningPruningCallback,
    network: nn.Module,
    image_shape: tuple[int, int, int] | None,
) -> list[Path]:
    """Write the pictures of a run: schedule, connections of the first layer, weights, layers.

    Args:
        folder: where.
        pruning: the callback, after the fit.
        network: the network that it pruned.
        image_shape: (channels, height, width) of the inputs, if they are images.
    """
    start, end = pruning.window
    history, in_steps = pruning.history, pruning.window_unit == "step"
    positions = [int(entry["step"] if in_steps else entry["epoch"] + 1) for entry in history]  # steps or epochs trained
    last = max([end, *positions])
    points = [last * index / _CURVE_POINTS for index in range(_CURVE_POINTS + 1)]
    curve = [pruning.total_amount * scheduled_fraction(pruning.schedule, point, start, end) for point in points]
    report = pruning.report()
    figures = {
        "schedule": schedule_figure(
            positions,
            [entry["scheduled"] for entry in history],
            [entry["applied"] for entry in history],
            curve=(points, curve),
            start_epoch=start,
            end_epoch=end,
            amount=pruning.total_amount,
            unit=pruning.window_unit,
        ),
        "layers": layers_figure(
            [layer.name for layer in report.layers],
            [layer.total for layer in report.layers],
            [layer.kept for layer in report.layers],
        ),
        "weights": weights_figure(
            {name.removesuffix(".weight"): p.detach() for name, p in network.named_parameters() if p.ndim > 1}
        ),
    }
    first = next(iter(pruning.masks.values()))
    if first.ndim == 1:
        noun = GRANULARITIES[report.granularity].noun
        figures[noun] = units_figure(
            [layer.name for layer in report.layers],
            [layer.total for layer in report.layers],
            [layer.kept for layer in report.layers],
            noun,
        )
    elif first.ndim == 2:
        figures["connections"] = connections_figure(first, image_shape)
    return save_figures(figures, folder)


@rank_zero_only
def print_config(config: DictConfig) -> None:
    """The configuration as a tree."""
    tree = Tree("configuration", style="dim", guide_style="dim")
    for name in config:
        if name == "hydra":
            continue
        node = OmegaConf.select(config, str(name), throw_on_missing=False)
        branch = tree.add(str(name), guide_style="dim")
        text = OmegaConf.to_yaml(node, resolve=True) if OmegaConf.is_config(node) else str(node)
        branch.add(Syntax(text.rstrip(), "yaml", background_color="default"))
    Console().print(tree)


@rank_zero_only
def print_report(report: Mapping[str, Any], pruned: PruningReport | None, folder: Path) -> None:
    """The results of a run: the table of its layers, and what report.json has besides."""
    console = Console()
    console.print(f"{report['experiment'] or 'fscreen'}, seed {report['seed']}", style="italic")
    if pruned is not None:
        console.print(str(pruned), markup=False, highlight=False, soft_wrap=True)
        console.print()
    facts = Table(show_header=False, box=None)
    params = {"nonzero": report["params"]["after"], **report["params"]}
    sizes = f"{params['before']:,} → {params['after']:,}, {params['nonzero']:,} of them not zero"
    facts.add_row("parameters", sizes)
    if (macs := report.get("macs")) and macs["before"]:
        facts.add_row("multiply–adds", f"{macs['before']:,} → {macs['after']:,} per image")
    for batch_size, times in report.get("latency_ms", {}).items():
        faster = times["before"] / times["after"]
        text = f"{times['before']:.2f} → {times['after']:.2f} ms, {faster:.2f} × as fast"
        facts.add_row(f"latency, batch of {batch_size}", text)
    if "test_error" in report:
        facts.add_row("test error", f"{100 * report['test_error']:.2f} % (last epoch)")
    facts.add_row("time", f"{report['seconds']:.0f} s")
    facts.add_row("results", str(folder))
    console.print(facts)
