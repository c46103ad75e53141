"""The only place that touches Lightning's strategies: which are supported, and how processes agree."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError
from lightning_fscreen.slimming.apply import Agree
from lightning_fscreen.statistics.collector import Merge
from lightning_fscreen.statistics.moments import Sums, merge_sums

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy)


def check_strategy(trainer: Trainer, slims_in_fit: bool) -> None:
    """Refuse strategies and callbacks that shard, move or average parameters in ways that pruning does not follow.

    Args:
        trainer: the trainer.
        slims_in_fit: whether training is to go on with a smaller network.

    Raises:
        NotImplementedError: names what is not supported, and what to use instead.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise NotImplementedError(
            "ScreeningPruningCallback does not support spawned or forked processes (strategy='ddp_spawn', "
            "'ddp_notebook'): they cannot hand a smaller network back; use strategy='ddp', or one device"
        )
    # Exact types: DeepSpeed and XLA strategies inherit from the supported ones.
    if type(trainer.strategy) not in _SUPPORTED:
        raise NotImplementedError(
            f"ScreeningPruningCallback does not support {type(trainer.strategy).__name__}; "
            "use Trainer(strategy='auto') on one device or strategy='ddp' on several"
        )
    if slims_in_fit and isinstance(trainer.strategy, DDPStrategy):
        _check_communication(trainer.strategy)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            raise NotImplementedError(
                "ScreeningPruningCallback does not support StochasticWeightAveraging, which adds an epoch of its own "
                "after the last; use WeightAveraging or EMAWeightAveraging, which follow, or average in a fit of the "
                "slim network"
            )
        if isinstance(callback, ModelPruning):
            raise NotImplementedError(
                "ScreeningPruningCallback does not support ModelPruning beside it, which puts products with masks into "
                'the place of weights; leave that out, and use granularity="weight", criterion="magnitude" for the same'
            )


def _check_communication(strategy: DDPStrategy) -> None:
    """Refuse hooks with a state: it may hold tensors of the size of buckets that are no more, as PowerSGD's does."""
    hook, state = strategy._ddp_comm_hook, strategy._ddp_comm_state  # noqa: SLF001  # Lightning has no public ones
    if hook is not None and not isinstance(state, torch.distributed.ProcessGroup | None):
        raise NotImplementedError(
            f"ScreeningPruningCallback does not support the communication hook {getattr(hook, '__name__', hook)!r}, "
            f"whose {type(state).__name__} does not become smaller with the network; use one without a state "
            "(fp16_compress_hook, bf16_compress_hook), no hook, or slim=False"
        )


def gather(trainer: Trainer, value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    # An object's tensors would be unpickled on the sender's device, in every process.
    value = pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu(), value)
    torch.distributed.all_gather_object(values, value)
    return values


def merge_processes(trainer: Trainer) -> Merge:
    """A function that merges the sums of all processes; every process gets the same result."""

    def merge(sums: Sums) -> Sums:
        if trainer.world_size == 1:
            return sums
        gathered = [trainer.strategy.all_gather(part) for part in sums]
        parts = [type(sums)(*(part[rank] for part in gathered)) for rank in range(trainer.world_size)]
        return functools.reduce(merge_sums, parts)

    return merge


def decide_once(trainer: Trainer, decide: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Let the first process decide, and give all processes its decision.

    Raises:
        ValueError: in all processes, if it cannot.
    """
    if trainer.world_size == 1:
        return decide()
    decision: Mapping[str, Tensor] = {}
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            decision = decide()
        except Exception as error:  # whatever it is, the others wait
            failure = error
    decision = {name: tensor.cpu() for name, tensor in decision.items()}  # not tied to the first process's device
    decision, said = trainer.strategy.broadcast((decision, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    if said is not None:
        raise ValueError(f"in process 0: {said}")
    return decision


@contextlib.contextmanager
def all_or_none(trainer: Trainer) -> Iterator[Agree]:
    """Within this context a network becomes smaller in all processes, or in none: otherwise one waits for the others.

    Yields:
        What the network's slimming asks for agreement, once at most.

    Raises:
        VerificationError: another process has failed, or would remove something else.
        RuntimeError: another process has failed with an error that ends its fit.
    """
    asked = False

    def agree(plan: SlimmingPlan) -> None:
        nonlocal asked
        asked = True
        _compare(trainer, plan, None)

    try:
        yield agree
        if not asked:  # nothing to remove here
            agree(SlimmingPlan())
    except Exception as error:  # the others wait for this process's word, whatever it is
        if not asked:
            _compare(trainer, None, error)
        raise


def _compare(trainer: Trainer, plan: SlimmingPlan | None, error: Exception | None) -> None:
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return
    expected = isinstance(error, CaptureError | VerificationError)
    own = (str(error), expected) if error is not None else None
    outcomes = gather(trainer, (own, plan.to_json() if plan is not None else ""))
    failed = {rank: failure for rank, (failure, _) in enumerate(outcomes) if failure is not None}
    if not failed:
        plans = [SlimmingPlan.from_json(text) for _, text in outcomes]
        if not all(other.is_like(plans[0]) for other in plans):
            raise VerificationError("the processes would remove different parts of the network, so nothing was removed")
        return
    if (error is not None and not expected) or failed == dict.fromkeys(range(len(outcomes)), own):
        return  # its own error says it
    rank, (message, _) = min(failed.items(), key=lambda item: item[1][1])  # unexpected ones first
    if not failed[rank][1]:
        raise RuntimeError(f"process {rank} failed while the network was made smaller: {message}") from error
    raise VerificationError(f"in process {rank}: {message}") from error


def broadcast_buffers(trainer: Trainer, model: nn.Module) -> None:
    """Give all processes the first one's buffers (running statistics differ between them), as DDP does in forward."""
    if isinstance(trainer.strategy.model, DistributedDataParallel):  # not after the fit, when devices have been left
        for buffer in model.buffers():
            values = buffer.detach().contiguous()
            torch.distributed.broadcast(values.view(-1).view(torch.uint8), 0)  # no backend lacks bytes
            buffer.copy_(values)


def rewrap(trainer: Trainer) -> None:
    """Let DistributedDataParallel see the parameters that the model has now."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
        strategy._pl_static_graph_delay_done = False  # noqa: SLF001  # as Lightning does for a new DDP module
