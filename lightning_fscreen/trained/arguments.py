"""The arguments of what ranks a trained network at once, without a Trainer, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

import torch
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.candidates.granularity import Patterns
from lightning_fscreen.candidates.prunable import Compensation, Feature
from lightning_fscreen.costs.timings import DEFAULT, Latency
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.modules import uncompiled
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.ranking.budgeted import Scope
from lightning_fscreen.ranking.schedule import one_shot
from lightning_fscreen.statistics.labels import find_labels


class Ranking(TypedDict, total=False):
    """How units are ranked and what takes their place; `prune` documents the arguments."""

    budget: Currency
    criterion: str
    screening_weight: float
    scope: Scope
    min_channels: int
    bias: Compensation
    feature: Feature
    round_to: int
    streams: bool
    latency: Latency
    num_classes: int | None
    labels: Callable[[Any], Tensor]


def network_of(model: nn.Module) -> nn.Module:
    """The model as it was written, without what `torch.compile` has wrapped around it.

    Raises:
        ValueError: it is wrapped for several devices or by Fabric, or modules of it are TorchScript.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | _FabricModule):
        raise ValueError(
            f"{type(model).__name__} is only a wrapper of the network; give its .module, and wrap that again"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {name!r}" if name else "the model"
            raise ValueError(
                f"{where} is TorchScript, from which nothing can be removed; give the module it was made of"
            )
    return uncompiled(model)


def settings_of(
    granularity: Literal["unit", "channel"] = "unit",
    amount: Amount = 0.0,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    budget: Currency = "macs",
    criterion: str = "reconstruction",
    screening_weight: float = 0.25,
    scope: Scope = "global",
    min_channels: int = 1,
    bias: Compensation = "ridge",
    feature: Feature = "activation",
    round_to: int = 1,
    streams: bool = False,
    latency: Latency = DEFAULT,
    num_classes: int | None = None,
    labels: Callable[[Any], Tensor] = find_labels,
) -> Settings:
    """The arguments of `prune`, checked.

    Raises:
        ValueError: an argument outside its range, a criterion that needs gradients.
    """
    if granularity not in ("unit", "channel"):
        raise ValueError(
            f'without a Trainer units are pruned: granularity must be "unit" or "channel", got {granularity!r}; for '
            "others use ScreeningPruningCallback"
        )
    settings = Settings(
        granularity=granularity,
        amount=amount,
        budget=budget,
        criterion=criterion,
        screening_weight=screening_weight,
        scope=scope,
        min_channels=min_channels,
        include=include,
        exclude=exclude,
        bias=bias,
        feature=feature,
        round_to=round_to,
        streams=streams,
        latency=latency,
        num_classes=num_classes,
        labels=labels,
        schedule=one_shot,
        start_epoch=0,
        end_epoch=None,
        start_step=None,
        end_step=None,
        prune_every=None,
        slim=True,
        collect_every="auto",
        collect_epochs=1,
        rewind_lr=False,
        rewind_weights=False,
        soft=False,
    )
    if settings.needs_gradients:
        raise ValueError(
            f"criterion={criterion!r} needs gradients, which a pass without a loss does not have; use another one, or "
            "ScreeningPruningCallback"
        )
    return settings
