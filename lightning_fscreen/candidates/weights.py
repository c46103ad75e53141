"""Weights of linear and convolution layers that can be pruned, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_fscreen.reasons import why_fixed


@dataclass(frozen=True)
class PrunableWeight:
    """The weight of one linear or convolution layer, its connections being the candidates."""

    name: str
    module: nn.Linear | _ConvNd

    @property
    def weight(self) -> nn.Parameter:
        """(out, in) or (out, in / groups, *kernel); transposed convolutions (in, out / groups, *kernel)."""
        return self.module.get_parameter("weight")

    def per_connection(self, values: Tensor) -> Tensor:
        """Spread a value per input over the connections that read that input.

        Args:
            values: (*, in).

        Returns:
            (*, …), the dimensions after `*` broadcastable to the weight's shape.
        """
        module = self.module
        if isinstance(module, nn.Linear):
            return values.unsqueeze(-2)
        kernel = [1] * len(module.kernel_size)
        if isinstance(module, _ConvTransposeNd):
            return values.reshape(*values.shape, 1, *kernel)
        groups, batch = module.groups, values.shape[:-1]
        by_group = values.reshape(*batch, groups, 1, module.in_channels // groups)
        rows = by_group.expand(*batch, groups, module.out_channels // groups if groups > 1 else 1, -1)
        return rows.reshape(*batch, -1, module.in_channels // groups, *kernel)


def num_inputs(module: nn.Module) -> int:
    """Number of input features or channels of a linear, convolution or batch-norm layer."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, _ConvNd):
        return module.in_channels
    if isinstance(module, _BatchNorm):
        return int(module.num_features)
    raise TypeError(f"no linear, convolution or batch-norm layer: {type(module).__name__}")


def find_weights(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> tuple[list[PrunableWeight], dict[str, str]]:
    """Linear and convolution layers of `model` in the order of its modules.

    Args:
        model: any module.
        include: glob patterns over module names; a layer must match one. All layers if None.
        exclude: glob patterns over module names; a layer must match none.

    Returns:
        The layers whose weights can be pruned, and {layer name: reason} of those that cannot.

    Raises:
        ValueError: a pattern that matches no layer; no layer left to prune.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)}
    selected = select(layers, include, exclude)
    found: list[PrunableWeight] = []
    excluded: dict[str, str] = {}
    owners: dict[int, str] = {}
    protected = {id(getattr(layers[name], "weight", None)): name for name in selected}
    for name, module in layers.items():
        reason = selected.get(name) or _why_not(module, owners)
        if reason is None and id(module.weight) in protected:
            other = protected[id(module.weight)]
            reason = f"shares its weight with {other!r}, which is {selected[other]}"
        if reason:
            excluded[name] = reason
        else:
            owners[id(module.weight)] = name
            found.append(PrunableWeight(name, module))
    require_candidates(found, type(model).__name__, "linear and convolution layers", excluded)
    return found, excluded


def require_candidates(found: Sequence[object], where: str, layers: str, reasons: Mapping[str, str]) -> None:
    """Check that there is something to prune.

    Args:
        found: the layers that can be pruned.
        where: how the model is called in the message.
        layers: how such layers are called.
        reasons: layer → why it cannot be pruned.

    Raises:
        ValueError: there is nothing; lists the reasons.
    """
    if not found:
        listing = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        why = f"none of its {layers} can be pruned:{listing}" if reasons else f"it has no {layers}"
        raise ValueError(
            f"nothing to prune in {where}: {why}\n"
            "Check include=/exclude=, requires_grad, and that the layers are attributes of the module; batch norms are "
            'pruned with granularity="channel", linear and convolution layers with granularity="weight".'
        )


def select(
    names: Iterable[str], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> dict[str, str]:
    """Apply include/exclude glob patterns; returns {name: reason} of the names they leave out.

    Raises:
        ValueError: a pattern matches no name.
    """
    names = list(names)
    left_out: dict[str, str] = {}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if patterns is None:
            continue
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{argument}={pattern!r} matches no layer; the layers are {names}")
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in patterns) != (argument == "include"):
                left_out.setdefault(name, f"left out by {argument}={patterns}")
    return left_out


def _why_not(module: nn.Linear | _ConvNd, owners: dict[int, str]) -> str | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "attention uses this layer's weight without calling it"
    return why_fixed(module, owners)
