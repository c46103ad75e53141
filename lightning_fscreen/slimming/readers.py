"""Readers: the layers that multiply the slots of an input by weights, so that new slots begin at their outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """One call of a layer.

    Attributes:
        layer: name of the module or of its weight, for messages.
        inputs, outputs: slot labels, (in,) and (out,).
        constant, known: (in,) the constants that arrive, and which inputs are constant.
    """

    layer: str
    inputs: Tensor
    outputs: Tensor
    constant: Tensor
    known: Tensor

    @abstractmethod
    def reads(self, rows: Tensor) -> Tensor:
        """(in,) bool: inputs that some of these outputs, (out,) bool, depend on."""

    @abstractmethod
    def feeds(self, columns: Tensor) -> Tensor:
        """(out,) bool: outputs that depend on some of these inputs, (in,) bool."""

    def silent(self) -> Tensor:
        """(in,) bool: inputs that are always zero."""
        return self.known & (self.constant == 0)

    def spared(self) -> Tensor:
        """(in,) bool: inputs that may go although they are read."""
        return self.silent()


@dataclass(frozen=True, kw_only=True)
class DenseReader(Reader):
    """A linear or ungrouped convolution layer.

    Attributes:
        module: name of the layer that can take constants into its bias; None if there is none, or more than one.
        weight, bias: names of the tensors.
        nonzero: (out, in) bool, whether any weight of the kernel is not zero; None where zeros count like all others.
        padded: zero padding meets the input, so that a constant is not the same at the border.
        input_dim: dimension of the weight that runs over inputs.
        called: whether the layer itself makes the call, so that it would add a bias that it is given.
        foldable: whether constants can go into the bias; only planning knows (see `carriable`).
        muted: (in,) bool, inputs whose weights are switched off; None if no gate does that here.
        switches: (in,) slot labels of the units that do.
    """

    module: str | None
    weight: str
    bias: str | None
    nonzero: Tensor | None
    padded: bool
    input_dim: int = 1
    called: bool = False
    foldable: bool = False
    muted: Tensor | None = None
    switches: Tensor | None = None

    def reads(self, rows: Tensor) -> Tensor:
        """Inputs with a weight that is not zero in one of the rows."""
        read = rows.any().expand(len(self.inputs)) if self.nonzero is None else self.nonzero[rows].any(0)
        return read if self.muted is None else read & ~self.muted

    def feeds(self, columns: Tensor) -> Tensor:
        """Outputs with a weight that is not zero in one of the columns."""
        columns = columns if self.muted is None else columns & ~self.muted
        if self.nonzero is None:
            return columns.any().expand(len(self.outputs))
        return torch.mv(self.nonzero.float(), columns.float()) > 0  # several times faster than to pick the columns out

    def spared(self) -> Tensor:
        """Constants go into the bias; where padding meets them, into one of them that stays."""
        return self.known if self.foldable or self.padded else self.silent()


@dataclass(frozen=True, kw_only=True)
class GroupedReader(Reader):
    """A grouped convolution: its outputs read the inputs of their own group."""

    groups: int

    def reads(self, rows: Tensor) -> Tensor:
        """All inputs of the groups that the rows belong to."""
        return rows.reshape(self.groups, -1).any(1).repeat_interleave(len(self.inputs) // self.groups)

    def feeds(self, columns: Tensor) -> Tensor:
        """All outputs of the groups that the columns belong to."""
        return columns.reshape(self.groups, -1).any(1).repeat_interleave(len(self.outputs) // self.groups)


@dataclass(frozen=True, kw_only=True)
class MeanReader(Reader):
    """A mean over all channels, which every output depends on; its outputs are its inputs' slots."""

    def reads(self, rows: Tensor) -> Tensor:
        """All channels."""
        return rows.any().expand(len(self.inputs))

    def feeds(self, columns: Tensor) -> Tensor:
        """All channels."""
        return columns.any().expand(len(self.outputs))


@dataclass(frozen=True, kw_only=True)
class NormReader(Reader):
    """A batch norm: every channel reads its own channel of the stream, and may leave it to others.

    Attributes:
        off: (out,) bool, channels whose scale is zero: any channel of the stream will do for them.
    """

    off: Tensor

    def reads(self, rows: Tensor) -> Tensor:
        """The same channels."""
        return rows

    def feeds(self, columns: Tensor) -> Tensor:
        """The same channels."""
        return columns

    def spared(self) -> Tensor:
        """Those that are multiplied by zero; every other output channel needs its input channel."""
        return self.off
