"""Prune PyTorch Lightning classifiers by what their activations say about the classes."""

from lightning_fscreen import functional, models
from lightning_fscreen import ranking as ranking  # registers the criteria
from lightning_fscreen.callback import ScreeningPruningCallback
from lightning_fscreen.costs.timings import Latency
from lightning_fscreen.fit.report import PruningReport
from lightning_fscreen.ranking.criteria import register_criterion
from lightning_fscreen.saving.checkpoints import load_from_checkpoint
from lightning_fscreen.saving.slimmed import load_slimmed, save_slimmed
from lightning_fscreen.slimming import SlimmingPlan, find_gates, register_operator, slim
from lightning_fscreen.statistics.metric import FStatistic
from lightning_fscreen.trained.explaining import explain
from lightning_fscreen.trained.pruning import prune
from lightning_fscreen.trained.screening import screen
from lightning_fscreen.trained.sensitivities import sensitivity

__version__ = "0.1.0"

__all__ = [
    "FStatistic",
    "Latency",
    "PruningReport",
    "ScreeningPruningCallback",
    "SlimmingPlan",
    "explain",
    "find_gates",
    "functional",
    "load_from_checkpoint",
    "load_slimmed",
    "models",
    "prune",
    "register_criterion",
    "register_operator",
    "save_slimmed",
    "screen",
    "sensitivity",
    "slim",
]
