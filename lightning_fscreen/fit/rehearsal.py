"""How long networks would take if they were smaller: they are made so, timed, and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.costs.timings import Timings
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.modules import is_within
from lightning_fscreen.randomness import same_random_numbers
from lightning_fscreen.slimming import SlimmingPlan


class _RehearsedError(Exception):
    """Undoes a removal that was only to be looked at."""


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
            with same_random_numbers(), network.examining(model):
                whole = copied(network.module)

                def look(plan: SlimmingPlan, network: Network = network, whole: nn.Module = whole) -> NoReturn:
                    times.append(network.times(timings, [whole, network.module]))
                    raise _RehearsedError

                args, inputs = network.inputs_on_device()
                try:
                    look(granularity.slim(network.module, args, inputs, inside, agree=look))  # where nothing goes
                except _RehearsedError:
                    continue
    finally:
        put_back()
    before, after = map(sum, zip(*times, strict=True))
    return after / before


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
