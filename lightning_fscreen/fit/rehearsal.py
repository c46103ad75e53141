"""A latency in a training: networks are made as small as they would be, timed, and put back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.costs.timings import Timings
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.spending import Spending
from lightning_fscreen.modules import is_within
from lightning_fscreen.ranking.asking import ask_for, too_much
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError
from lightning_fscreen.slimming.apply import rehearsed

log = logging.getLogger(__name__)


def find_asked(spending: Spending, masks: Masks, measure: Callable[[], float]) -> float:
    """What to ask of the sum of all operations, so that the amount goes of the measured latency.

    Args:
        spending: what the budget counts; its `asked` changes.
        masks: the masks until now.
        measure: latency of what would be left under `spending.asked`, as a share of what it is.

    Raises:
        ValueError: the amount cannot go.
    """
    amount = spending.amount(masks)

    def attempt(asked: float) -> tuple[float, float]:
        spending.asked = asked
        return 1 - measure(), asked

    try:
        answer = ask_for(amount, lambda: spending.most(masks), attempt, spending.asked)
    except (CaptureError, VerificationError) as error:  # it will be said when the network is to become smaller
        log.info("latency is taken for the sum of all operations: %s", error)
        return amount
    if answer.is_most:
        raise ValueError(too_much(amount, answer.share))
    return answer.result


def _times(network: Network, timings: Timings, modules: Sequence[nn.Module], plan: SlimmingPlan) -> list[float]:
    return network.times(timings, modules)


def latency_without(
    model: nn.Module,
    networks: Iterable[Network],
    granularity: Granularity[Any],
    kept: Mapping[str, Tensor],
    timings: Timings,
) -> float:
    """Latency of the networks without what goes, as a share of what it is with it; both are measured in turns.

    Args:
        model: the module that holds the networks; as before, afterwards.
        networks: the networks.
        granularity: the candidates.
        kept: layer → mask of its candidates.
        timings: where time is measured.

    Raises:
        CaptureError, VerificationError: a network cannot be made smaller.
        ValueError: one cannot be copied, or timed.
    """
    members = granularity.members()
    put_back = remember({tensor for own in members.values() for tensor in (own.weight, *own.others)})
    times: list[list[float]] = []
    try:
        Masks(members).set(kept)
        for network in networks:
            prefix = f"{network.name}." if network.name else ""
            inside = {name.removeprefix(prefix): mask for name, mask in kept.items() if is_within(name, network.name)}
            with network.examining(model):
                modules = [copied(network.module), network.module]
                args, inputs = network.inputs_on_device()
                slim = partial(granularity.slim, network.module, args, inputs, inside, ())
                times.append(rehearsed(slim, partial(_times, network, timings, modules)))
    finally:
        put_back()
    before, after = map(sum, zip(*times, strict=True))
    return after / before


def compare(
    model: nn.Module, networks: Sequence[Network], before: Sequence[nn.Module], timings: Timings
) -> tuple[int, int]:
    """Nanoseconds of all networks, before and now, measured in turns: the speed of a machine changes meanwhile.

    Args:
        model: the module that holds the networks.
        networks: the networks as they are now.
        before: these as they were, from `copied`.
        timings: where time is measured.
    """
    times = []
    for network, module in zip(networks, before, strict=True):
        with network.examining(model):
            times.append(network.times(timings, [module, network.module]))
    dense, slim = (round(1e6 * sum(each)) for each in zip(*times, strict=True))
    return dense, slim


def remember(parameters: Iterable[Tensor]) -> Callable[[], None]:
    """What puts the values of parameters back."""
    values = {parameter: parameter.detach().clone() for parameter in parameters}

    @torch.no_grad()
    def put_back() -> None:
        for parameter, value in values.items():
            parameter.copy_(value)

    return put_back


def copied(module: nn.Module) -> nn.Module:
    """A copy to time beside the smaller network.

    Raises:
        ValueError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:  # whatever a module raises that holds what cannot be copied
        raise ValueError(
            f'{type(module).__name__} cannot be copied ({error}), as budget="latency" needs, to time it beside the '
            'smaller network; take budget="macs"'
        ) from error
