"""Channels that are switched off and stay nevertheless, and why, in words for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.readers import DenseReader, NormReader, Reader
from lightning_fscreen.slimming.slots import SlotGraph

_VARIES = (
    "multiplied by what depends on the input (squeeze-and-excitation), behind a PReLU with one slope for all channels, "
    "or after the zero padding of a depthwise convolution, so that it is no constant there"
)
_SIZES = "as a constant that depends on the sizes of the input, or may do so"
_SHAPE = "a layer keeps at least one channel, or as many as make its width a multiple of round_to"


def kept_for(
    slots: SlotGraph,
    readers: Sequence[Reader],
    live: Tensor,
    kept: Tensor,
    off: Mapping[str, Off],
    zeros_alone: bool = False,
) -> dict[str, str]:
    """Batch norm → how many of its channels that are switched off stay, and why.

    Args:
        slots: the slots.
        readers: the readers, as for `live_slots`.
        live: (number of slots,) bool, those that the function needs.
        kept: likewise, with those that are kept for a tensor's shape.
        off: gate → its units that are switched off.
        zeros_alone: as of `make_change`.
    """
    root = slots.components(pinned=False)
    folded = any(bool((channels.constant[channels.pruned] != 0).any()) for channels in off.values())
    varies = (_SIZES if zeros_alone else _VARIES) + ("; bias='zero' removes it" if folded else "")
    why = _reasons(slots, root, readers, live, off, varies)
    texts = {}
    for name, channels in off.items():
        labels = slots.gates.get(name)
        if labels is None:
            continue
        staying = channels.pruned & kept[labels]
        reasons = Counter(why.get(label, _SHAPE) for label in root[labels[staying]].tolist())
        if reasons:
            parts = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
            texts[name] = f"{int(staying.sum())} of {int(channels.pruned.sum())} pruned channels stay: {parts}"
    return texts


def _reasons(
    slots: SlotGraph, root: Tensor, readers: Sequence[Reader], live: Tensor, off: Mapping[str, Off], varies: str
) -> dict[int, str]:
    """Class of slots → why it lives."""
    why: dict[int, str] = {}

    def note(labels: Tensor, reason: str) -> None:
        for label in root[labels].unique().tolist():
            why.setdefault(label, reason)

    for labels, reason in slots.pins:
        note(labels, reason)
    for name, labels in slots.gates.items():
        note(labels[~off[name].pruned] if name in off else labels, f"it can only go together with channels of {name!r}")
    if off.keys() & slots.layers.keys():  # neurons are pruned, so that others could have been
        for name, labels in slots.layers.items():
            if name not in off and name not in slots.depthwise:
                note(labels, f"it can only go together with neurons of {name!r}")
    for reader in readers:
        read = reader.reads(live[reader.outputs])
        if isinstance(reader, NormReader):
            note(reader.inputs[read & ~reader.off], f"{reader.layer!r} normalises it")
            continue
        constant = reader.known & (reader.constant != 0)
        note(
            reader.inputs[read & ~reader.known],
            f"{reader.layer!r} reads it {varies}",
        )
        if isinstance(reader, DenseReader) and reader.padded:
            note(
                reader.inputs[read & constant & live[reader.inputs]],
                f"one channel carries the constants of all that {reader.layer!r} has lost past its zero padding",
            )
        note(
            reader.inputs[read & ~reader.spared() & torch.as_tensor(constant)],
            f"{reader.layer!r} cannot take its constant",
        )
    return why
