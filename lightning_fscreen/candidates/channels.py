"""Channels of batch norms as candidates."""

from __future__ import annotations

from lightning_fscreen.candidates.granularity import register_granularity
from lightning_fscreen.candidates.units import Units


@register_granularity("channel")
class Channels(Units):
    """Channels of batch norms, as in the paper; all other layers keep their units, but for what goes with a channel.

    Args:
        model: any module.
        include, exclude: glob patterns over names of batch norms.
        bias, feature, round_to, streams: as of `Units`.

    Raises:
        ValueError: no batch norm, patterns that match nothing.
    """

    noun = "channels"
    gates = ("channel",)
