"""`prune`: a trained network made smaller in one call, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.candidates.granularity import Patterns
from lightning_fscreen.candidates.prunable import Compensation, Feature
from lightning_fscreen.costs.timings import DEFAULT, Latency
from lightning_fscreen.ranking.amounts import Amount
from lightning_fscreen.ranking.budgeted import Scope
from lightning_fscreen.slimming.optimizers import awaiting, follow_plan, optimizers_of, warn_of_orphans
from lightning_fscreen.statistics.labels import find_labels
from lightning_fscreen.statistics.one_pass import Forward
from lightning_fscreen.trained.arguments import network_of, settings_of
from lightning_fscreen.trained.auto_amount import MAX_DROP, limit_of
from lightning_fscreen.trained.deciding import decide
from lightning_fscreen.trained.evaluation import Measure
from lightning_fscreen.trained.one_shot import Pruned, observed


def prune(
    model: nn.Module,
    dataloader: Iterable[Any],
    amount: Amount | Literal["auto"] = 0.5,
    *,
    budget: Currency = "macs",
    granularity: Literal["unit", "channel"] = "unit",
    criterion: str = "reconstruction",
    screening_weight: float = 0.25,
    scope: Scope = "global",
    min_channels: int = 1,
    include: Patterns = None,
    exclude: Patterns = None,
    bias: Compensation = "ridge",
    feature: Feature = "activation",
    num_classes: int | None = None,
    labels: Callable[[Any], Tensor] = find_labels,
    forward: Forward | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    metric: Measure | None = None,
    val_dataloader: Iterable[Any] | None = None,
    max_drop: float = MAX_DROP,
    round_to: int = 1,
    streams: bool = False,
    latency: Latency = DEFAULT,
    progress: bool = True,
) -> Pruned:
    """Make a trained network smaller in place, in one call: statistics in one pass, ranking, exact removal.

    What remains computes what the whole network does with the pruned units at a constant (see `slim`), or predicted
    from the others. Fine-tune it afterwards; or prune little by little, each time a share of what the network is then:

        for _ in range(5):
            prune(model, train_loader, amount=0.15, optimizers=optimizer)
            train_one_epoch(model, optimizer)

    `save_slimmed` keeps all of it together, and `load_slimmed` gives it to a fresh network. Arguments that are not
    explained here are those of `ScreeningPruningCallback`, with its meanings.

    Args:
        model: any module that `torch.export` can capture with the inputs of the first batch.
        dataloader: batches, which the model gets in eval mode; consumed once, and no further than the first batch if
            the criterion looks at weights alone and `bias` at no activations. Some hundred instances are needed for the
            defaults to be good, more for wide layers; from under 64, `criterion="screening"` ranked better: a warning.
        amount: what goes of the multiply–adds, the parameters or the candidates that the model has now; of candidates
            also one for every pattern. "auto": the largest whose `metric` right after pruning, before any fine-tuning,
            is worse by `max_drop` at most; bisection, by ten evaluations of the masked network and one before.
        budget: "macs", "params", "latency" or "candidates".
        granularity: "unit": channels of batch norms, outputs of all other layers, heads; "channel": the first alone.
        criterion: any that needs no gradients. "reconstruction": by how much the layers that read a unit are off
            without it, if the other units make up for it.
        screening_weight: λ of the criteria that join F and magnitude.
        scope: "global", "kind" or "layer".
        min_channels: units that every layer keeps at least.
        include: glob patterns over module names, one of which a layer must match.
        exclude: glob patterns over module names, none of which a layer may match.
        bias: what stands for the output of what is pruned: "ridge", what a ridge regression on what stays predicts,
            inside the weights that read both (where that cannot be, zero); "mean", its mean activation; "fold", its
            shift; "zero".
        feature: what is screened.
        num_classes: number of classes; by default looked for in the model (`num_classes`, the last linear layer).
        labels: batch → class indices (N,) or class weights (N, C); by default found in (x, y), dicts, ….
        forward: (model, batch) → anything, runs the model; by default calls it with the batch's first item (or the item
            that is not the labels).
        optimizers: the optimizers in use, as of `slim`.
        metric: for "auto": (model, dataloader) → float, higher is better; or a metric of torchmetrics that is given
            outputs and labels, with its own `higher_is_better`. The model is in eval mode then, without gradients.
        val_dataloader: for "auto": the batches of the metric; such that the ranking has not seen.
        max_drop: for "auto", in the unit of the metric.
        round_to: leave every width of a layer as it is, or a multiple of this; as of the callback.
        streams: also prune channels of streams as one with all that read them; as of the callback.
        latency: what a budget of latency means; as of the callback.
        progress: show a progress bar.

    Returns:
        The plan, and the report.

    Raises:
        ValueError: an argument outside its range, a criterion that needs gradients, an empty loader, labels not found,
            nothing to prune, a budget that cannot be met, a metric that is no finite number.
        CaptureError: the model cannot be captured.
        VerificationError: outputs would change.
        Nothing has changed after an error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import prune
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(2)]
        >>> plan, report = prune(net, batches, amount=0.5, progress=False)
        >>> net[0], report.before.macs, report.after.macs
        (Linear(in_features=8, out_features=32, bias=True), 704, 352)
    """
    model = network_of(model)
    auto = amount == "auto"
    settings = settings_of(
        granularity,
        0.0 if amount == "auto" else amount,
        include,
        exclude,
        budget=budget,
        criterion=criterion,
        screening_weight=screening_weight,
        scope=scope,
        min_channels=min_channels,
        bias=bias,
        feature=feature,
        round_to=round_to,
        streams=streams,
        latency=latency,
        num_classes=num_classes,
        labels=labels,
    )
    used = optimizers_of(model, optimizers)
    limit = limit_of(model, auto, metric, val_dataloader, max_drop, labels, forward)
    found = observed(model, settings, dataloader, forward, progress=progress, title="pruning")
    choice = decide(found, settings.amount, settings.budget) if limit is None else limit.largest(found, progress)
    before = dict(model.named_parameters())
    awaited = awaiting(before)
    plan = found.slim(choice.kept)
    warn_of_orphans(used, model, follow_plan(used, model, before, plan), awaited)
    return found.report(choice, plan)
