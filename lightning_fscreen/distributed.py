"""The only place that touches Lightning's strategies: which are supported, and how processes agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_fscreen.functional import ClassSums, f_statistic_merge

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy)


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard or move parameters in ways that pruning does not follow.

    Raises:
        NotImplementedError: names the strategy and what to use instead.
    """
    # Exact types: DeepSpeed and XLA strategies inherit from the supported ones.
    if type(trainer.strategy) not in _SUPPORTED:
        raise NotImplementedError(
            f"ScreeningPruningCallback does not support {type(trainer.strategy).__name__}; "
            "use Trainer(strategy='auto') on one device or strategy='ddp' on several"
        )


def merge_processes(trainer: Trainer) -> Callable[[ClassSums], ClassSums]:
    """A function that merges the sums of all processes; every process gets the same result."""

    def merge(sums: ClassSums) -> ClassSums:
        if trainer.world_size == 1:
            return sums
        gathered = [trainer.strategy.all_gather(part) for part in sums]
        merged = ClassSums(*(part[0] for part in gathered))
        for rank in range(1, trainer.world_size):
            merged = f_statistic_merge(merged, ClassSums(*(part[rank] for part in gathered)))
        return merged

    return merge


def decide_once(trainer: Trainer, decide: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Let the first process decide, and give all processes its decision."""
    if trainer.world_size == 1:
        return decide()
    return trainer.strategy.broadcast(decide() if trainer.is_global_zero else None)  # type: ignore[return-value]
