"""What slimming would leave of a network for any masks, after one walk over its graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.kinds import kind_of, off
from lightning_fscreen.slimming.liveness import live_slots, removed_constants
from lightning_fscreen.slimming.multiples import find_multiples
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.planning import carriable
from lightning_fscreen.slimming.readers import DenseReader, NormReader, Reader
from lightning_fscreen.slimming.slots import PINNED, SlotGraph


class Widths:
    """The classes of slots of a network, and those of them that stay for any masks that prune whole units.

    The walk is made with everything switched off that can be. What is constant then is constant for other masks, too,
    if all units of its own class are off: constants of different slots never meet, or the slots would be one. (Where
    two are multiplied one of them is enough; but they are one unit, see `Gate.units`, and go together.)

    Args:
        network: the network.
        captured: its graph.
        gates: the gates whose units masks may switch off, and how many they have; those that the graph does not use
            are left out.
        silent: whether their shifts are zeroed as well; else they stay as they are now.
        round_to: number of which widths of layers become multiples, see `make_change`.
        new_shifts: whether pruned units will get other shifts, none of them zero, no two the same.

    Attributes:
        dims: (tensor name, dim) → the class of each index, for all that can be cut.
        layers: those of them that are widths of linear and convolution layers.
        products: call that multiplies activations → the classes of its result.
        calls: call → the classes of its result.
        selects: batch norm → the class of each of its channels, where it may have to select them from a stream that
            others read, too.
        units: gate → the class of each of its units.
        held: (pairs, 2): classes without units of their own, and the class of a unit that reads them: a channel of a
            batch norm, or an input. They go when no such unit is left; classes that others read as well are not among
            them.
        stuck: (classes,) bool: units that stay although they are switched off, since the constant that is left of them
            cannot be carried by a layer that reads it.
    """

    def __init__(
        self,
        network: nn.Module,
        captured: Capture,
        gates: Mapping[str, int],
        silent: bool,
        round_to: int = 1,
        new_shifts: bool = False,
    ) -> None:
        modules, switched = dict(network.named_modules()), {}
        for name, count in gates.items():
            everything = torch.ones(count, dtype=torch.bool)
            kind = kind_of(modules[name]) if name in modules else None
            if kind is None:  # heads, of which nothing is left
                switched[name] = Off(everything, torch.zeros(count, dtype=torch.float64))
            else:
                switched[name] = off(modules[name], kind, everything, silent)
                if new_shifts and kind.shift(modules[name]) is not None:
                    switched[name] = Off(everything, torch.linspace(1, 2, count, dtype=torch.float64))
        slots = find_slots(network, captured, switched)
        _, self._class = slots.components().unique(return_inverse=True)  # that of PINNED is 0, like itself
        self.count = 1 + int(self._class.max())
        self.dims = {place: self._class[labels] for place, labels in slots.dims.items()}
        self.layers = {place: self.dims[place] for place in slots.widths}
        self.products = {call: self._class[labels] for call, labels in slots.products.items()}
        self.calls = {call: self._class[labels] for call, labels in slots.calls.items()}
        self.units = {name: self._class[slots.gates[name]] for name in gates if name in slots.gates}
        self._readers = [
            replace(reader, inputs=self._class[reader.inputs], outputs=self._class[reader.outputs])
            for reader in carriable(network, slots)
        ]
        different = {labels.numpy().tobytes(): place for place, labels in self.dims.items()}  # a norm has four alike
        # Those that may need a bias for constants that they read.
        self._unbiased = [
            isinstance(reader, DenseReader) and reader.bias is None and bool((reader.constant != 0).any())
            for reader in self._readers
        ]
        self._graph = SlotGraph(dims={place: self.dims[place] for place in different.values()}, _count=self.count)
        self._multiples = find_multiples(self.layers.values(), self.count, round_to) if round_to > 1 else None
        self._has_units = self._marked(*self.units.values())
        self.held = self._find_held()
        self.selects = self._find_selects(slots)
        self.stuck = self._has_units & self._find_stuck()

    def remaining(self, keep: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """What stays.

        Args:
            keep: gate → (units,) bool, True where kept; those not named keep all.

        Returns:
            (classes,) bool, and the number of bias values that layers without a bias get, to carry constants.
        """
        readers = self._masked(keep)
        live, kept = live_slots(self._graph, readers, self._multiples)
        biases = 0
        for reader in itertools.compress(readers, self._unbiased):
            assert isinstance(reader, DenseReader)
            gone, carrier = removed_constants(reader, live, kept)
            biases += int(kept[reader.outputs].sum()) if carrier is None and bool(gone.any()) else 0
        return kept, biases

    def live(self, keep: Mapping[str, Tensor]) -> Tensor:
        """(classes,) bool, those of what stays that the function needs; the others only make widths multiples."""
        return live_slots(self._graph, self._masked(keep))[0]

    def _masked(self, keep: Mapping[str, Tensor]) -> list[Reader]:
        on = self._marked(*(labels[keep[name]] if name in keep else labels for name, labels in self.units.items()))
        switched = self._has_units & ~on

        def masked(reader: Reader) -> Reader:
            if isinstance(reader, NormReader):
                pruned = torch.zeros_like(reader.off) if reader.layer not in keep else ~keep[reader.layer]
                return replace(reader, off=pruned)
            off = switched[reader.inputs]
            reader = replace(reader, known=reader.known & (off | ~self._has_units[reader.inputs]))  # or in any case
            if isinstance(reader, DenseReader) and reader.muted is not None:
                return replace(reader, muted=reader.muted & switched[self._class[reader.switches]])
            return reader

        return [masked(reader) for reader in self._readers]

    def _find_held(self) -> Tensor:
        pairs = [torch.empty(0, 2, dtype=torch.int64)]
        others = self._marked(torch.tensor([PINNED]))
        for reader in self._readers:
            if isinstance(reader, NormReader) and reader.layer in self.units:
                pairs.append(torch.stack([reader.inputs, reader.outputs], dim=1))
            elif isinstance(reader, DenseReader) and reader.switches is not None:  # all of it is switched off
                pairs.append(torch.stack([reader.inputs, self._class[reader.switches]], dim=1))
            else:
                others[reader.inputs[~reader.known]] = True
        held = torch.cat(pairs)
        return held[~(others | self._has_units)[held[:, 0]]]

    def _find_selects(self, slots: SlotGraph) -> dict[str, Tensor]:
        readers = torch.bincount(self.held[:, 0], minlength=self.count)
        found = {}
        for name, stream in slots.streams.items():
            shared = readers[self._class[stream.labels[stream.indices]]] != 1
            if name in self.units and bool(shared.any()):
                found[name] = self.units[name]
        return found

    def _find_stuck(self) -> Tensor:
        read = [torch.empty(0, dtype=torch.int64)]
        for reader in self._readers:
            if not isinstance(reader, NormReader):
                muted = reader.muted if isinstance(reader, DenseReader) else None
                needed = ~reader.spared() if muted is None else ~(reader.spared() | muted)
                read.append(reader.inputs[needed])
        return self._marked(*read)

    def _marked(self, *classes: Tensor) -> Tensor:
        marked = torch.zeros(self.count, dtype=torch.bool)
        for labels in classes:
            marked[labels] = True
        return marked
