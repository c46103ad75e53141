"""What processes send each other, and which communication hooks go on with a smaller network: those without a state."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

from lightning_fscreen.fit.distributed import broadcast_buffers, check_strategy, decide_once, gather
from tests.pretended import pretended, pretending


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


def test_objects_are_sent_without_their_device_and_buffers_as_tensors(monkeypatch):
    """A tensor in an object would be unpickled on the sender's device, in every process."""
    sent, wrapped = [], DistributedDataParallel.__new__(DistributedDataParallel)
    strategy = SimpleNamespace(model=wrapped, broadcast=lambda value: sent.append(value[0]) or value)
    trainer = SimpleNamespace(world_size=2, is_global_zero=True, strategy=strategy)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda values, value: sent.extend(value["sums"]))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, rank: sent.append(tensor.zero_()))
    with pretending():
        norm = torch.nn.BatchNorm2d(3).to("cuda")
        gather(trainer, {"sums": [norm.running_var]})
        decide_once(trainer, lambda: {"layer": norm.running_var})
        objects = [sent[0], sent[1]["layer"]]
        broadcast_buffers(trainer, norm)
    assert [pretended(tensor).type for tensor in objects] == ["cpu", "cpu"] and len(sent) == 2 + 3
    assert {(pretended(tensor).type, tensor.dtype) for tensor in sent[2:]} == {("cuda", torch.uint8)}
    assert not norm.running_var.any()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_process_that_decides_is_one_in_all(rank):
    """The others would wait for its decision."""
    said = ({}, "the scores of 'fc' contain NaN")
    strategy = SimpleNamespace(broadcast=lambda value: value if rank == 0 else said)
    trainer = SimpleNamespace(world_size=2, is_global_zero=rank == 0, strategy=strategy)

    def decide():
        raise ValueError(said[1])

    with pytest.raises(ValueError, match="scores of 'fc' contain NaN"):
        decide_once(trainer, decide)
