"""Where activations are read, and what is known of them after an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_fscreen.modules import num_inputs, num_outputs
from lightning_fscreen.statistics.features import Activation


@dataclass(frozen=True)
class Probe:
    """One place where activations are read.

    Attributes:
        name: name of the layer.
        module: the layer.
        side: its "input" or its "output".
        activation: an element-wise function that is applied to the values there; None for none.
        square: whether the result is squared.
    """

    name: str
    module: nn.Module
    side: Literal["input", "output"] = "input"
    activation: Activation | None = None
    square: bool = False

    @property
    def num_features(self) -> int:
        """Channels (features) there."""
        return num_inputs(self.module) if self.side == "input" else num_outputs(self.module)


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of the features at one probe, over the activations of an epoch.

    Attributes:
        f: (features,) F-statistics; for exact connections, of the weight's shape.
        spread: (features,) F-statistics of the squared deviations from the mean.
        mean: (features,) mean activation.
        mean_square: (features,) mean squared activation.
        variance: (features,) variance of the activation.
        degrees: degrees of freedom of both F, between and within the classes: (C − 1, n − C).
        shared: (features,) share of its variance within classes that a feature without evidence has in common with one
            that has; see `common.shared_variance`.
        learned: (features,) bool, whether trained weight matrices had a part in it; see `origins.learned_features`.
    """

    f: Tensor
    spread: Tensor
    mean: Tensor
    mean_square: Tensor
    variance: Tensor
    degrees: tuple[float, float]
    shared: Tensor
    learned: Tensor
