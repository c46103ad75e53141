"""Which communication hooks go on with a smaller network: those without a state."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks

from lightning_fscreen.fit.distributed import check_strategy


def compressed():
    state = powerSGD_hook.PowerSGDState(process_group=None)
    return DDPStrategy(ddp_comm_hook=powerSGD_hook.powerSGD_hook, ddp_comm_state=state)


def with_strategy(strategy):
    return SimpleNamespace(strategy=strategy, callbacks=[])


def test_a_hook_with_a_state_is_refused_by_name_where_the_network_becomes_smaller():
    with pytest.raises(NotImplementedError, match="powerSGD_hook.*PowerSGDState.*fp16_compress_hook"):
        check_strategy(with_strategy(compressed()), slims_in_fit=True)
    check_strategy(with_strategy(compressed()), slims_in_fit=False)


@pytest.mark.parametrize(
    "hook",
    [
        None,
        default_hooks.allreduce_hook,
        default_hooks.fp16_compress_hook,
        default_hooks.bf16_compress_hook,
        quantization_hooks.quantization_pertensor_hook,
    ],
)
def test_hooks_without_a_state_are_supported(hook):
    check_strategy(with_strategy(DDPStrategy(ddp_comm_hook=hook)), slims_in_fit=True)
