"""Forward hooks that turn activations into class sums, open only while a training step runs its forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils.hooks import RemovableHandle

from lightning_fscreen.functional import ClassSums, check_labels, f_statistic_compute
from lightning_fscreen.functional.members import IGNORED
from lightning_fscreen.statistics.buffer import ActivationBuffer
from lightning_fscreen.statistics.common import Marks, Sample, shared_variance
from lightning_fscreen.statistics.connections import ConnectionSums
from lightning_fscreen.statistics.features import PositionMeans, feature_dimension
from lightning_fscreen.statistics.labels import check_proportions
from lightning_fscreen.statistics.moments import Sums, spread_statistic
from lightning_fscreen.statistics.origins import learned_features
from lightning_fscreen.statistics.padding import Tokens
from lightning_fscreen.statistics.probes import FeatureStatistics, Probe
from lightning_fscreen.statistics.sums import FeatureSums

log = logging.getLogger(__name__)

examined: ContextVar[bool] = ContextVar("examined", default=False)
"""Whether the network runs only to be looked at, by one of several callbacks: no part of the training."""


def trains() -> bool:
    """Whether what runs is the training: not while `examined`, nor in torch.func's transforms of single instances."""
    return not examined.get() and peek_interpreter_stack() is None


class Merge(Protocol):
    """Merges sums with those of other processes."""

    def __call__(self, sums: Sums, /) -> Sums:
        """The sums of all of them."""
        ...


class ActivationCollector:
    """Online class sums of the activations at some probes.

    Activations are gathered between `attach` and `remove`, as the model runs; `update(labels)` then adds them, as one
    batch, to the sums. A layer that runs several times in a step counts with the mean of its runs.

    Args:
        probes: where to read.
        num_classes: C.
        exact: names of probes at the inputs of layers whose connections get sums of their own.

    Attributes:
        unmatched: layers without statistics, and why: they ran on another number of instances than there are labels (on
            windows, say, of which it is not known which belong to which), or whoever made this has noted something.
    """

    def __init__(self, probes: Sequence[Probe], num_classes: int, exact: Iterable[str] = ()) -> None:
        self.num_classes = num_classes
        self.unmatched: dict[str, str] = {}
        self._probes = list(probes)
        places = {probe.name: index for index, probe in enumerate(self._probes)}
        self._exact = {places[name]: ConnectionSums(self._probes[places[name]].module, num_classes) for name in exact}
        self._weights: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._means = PositionMeans()
        self._tokens: Tokens | None = None  # of the batch that runs
        self._buffer = ActivationBuffer([probe.num_features for probe in self._probes], self._device)
        self.reset()

    def attach(self, tokens: Tokens | None = None) -> None:
        """Register the hooks, unless they are.

        Args:
            tokens: those that count in the batch that runs next; None for all.
        """
        self._tokens = tokens
        if self._handles:
            return
        for index, probe in enumerate(self._probes):
            if probe.side == "input":
                hook = probe.module.register_forward_pre_hook(self._input_hook(index), with_kwargs=True)
            else:
                hook = probe.module.register_forward_hook(self._output_hook(index))
            self._handles.append(hook)

    def remove(self) -> None:
        """Take the hooks away again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forget all sums."""
        self._buffer.clear()  # new memory would be mapped page by page, as it is written
        self._sums = FeatureSums(self._buffer.columns, self.num_classes, self._device, self._exact)
        self._learned = [torch.zeros(probe.num_features, dtype=torch.bool) for probe in self._probes]
        self._sample: Sample | None = None  # of the features that are not learned
        self._batches = 0  # that have been added
        self._weights.clear()

    @property
    def _device(self) -> torch.device:
        return next((p.device for probe in self._probes for p in probe.module.parameters()), torch.device("cpu"))

    def discard(self) -> None:
        """Forget the activations gathered since the last update."""
        self._buffer.discard()
        self._weights.clear()

    def update(self, labels: Tensor, belong: bool = False) -> None:
        """Add the activations gathered since the last update, whose instances have these labels.

        Args:
            labels: (N,) class indices or (N, C) class weights.
            belong: whether they are known to belong to the instances of the batch, whatever rows the layers ran on.

        Raises:
            ValueError: bad labels, or all layers ran with another number of instances, unless `belong`; nothing is
                added then.
        """
        buffer = self._buffer
        if not buffer.ran:
            return
        try:
            if labels.device.type == "cpu" or self._batches == 0:
                check_labels(labels, self.num_classes)
                check_proportions(labels)
            labels = labels.to(buffer.device)
            self._drop_unmatched(len(labels), belong)
            ran = buffer.ran
            if len(ran) == len(self._probes) and not self._exact:
                if not buffer.has_room(len(labels)):
                    self._flush()
                buffer.keep(labels)
            else:
                self._flush()
                if len(labels) and ran:
                    features = buffer.features()
                    if len(ran) == len(self._probes):
                        self._sampled().add(features, [labels])
                    self._sums.add(ran, features, [labels], self._batches, self._weights)
            self._batches += 1
        finally:
            self.discard()

    def statistics(self, merge: Merge = lambda sums: sums) -> dict[str, FeatureStatistics]:
        """F-statistics and moments by probe name.

        Args:
            merge: merges the sums with those of other processes.

        Returns:
            Those of the layers that ran on instances with labels.

        Raises:
            ValueError: NaN or inf activations (names the layer and the batch), no layer that ran, labels outside the
                classes, fewer than two classes.
        """
        self._flush()
        moments = merge(self._sums.moments)
        self._check_finite(moments.class_sums.squares)
        learned = merge(Marks(torch.cat(self._learned).to(moments.shift))).counts > 0  # layers may run in some alone
        places = list(zip(self._probes, self._buffer.columns, strict=True))
        ran = moments.counts.any(0)
        if not bool(ran.any()):
            if self.unmatched:
                return {}
            raise ValueError(
                f"none of the layers {[probe.name for probe in self._probes]} ran on an instance with a label, so "
                f"there is no F-statistic; check the labels if all of them are {IGNORED}"
            )
        moments = type(moments)(*(sums[..., ran] for sums in moments))
        merged = moments.class_sums
        counts = merged.counts.sum(0)
        offset = merged.sums.sum(0) / counts
        f, spread = f_statistic_compute(merged), spread_statistic(moments)
        mean = merged.shift + offset
        mean_square = merged.squares / counts + 2 * merged.shift * offset + merged.shift**2
        variance = (merged.squares / counts - offset**2).clamp(min=0)
        statistics = {}
        for index, (probe, place) in enumerate(places):
            if not bool(ran[place.start]):
                continue
            start = int(ran[: place.start].sum())
            columns = slice(start, start + place.stop - place.start)
            probe_f = f[columns]
            if index in self._exact:
                connections = self._exact[index]
                probe_f = f_statistic_compute(merge(connections.class_sums())).view(connections.shift.shape)
            present = merged.counts[:, columns.start]
            between = float((present > 0).sum()) - 1
            degrees = between, float(present.sum()) - between - 1
            own = ClassSums(*(part[..., columns] for part in merged))
            marginal = torch.maximum(f[columns], spread[columns].nan_to_num(0))
            shared = shared_variance(self._sampled(), place.start, own, marginal, degrees, learned[place], merge)
            statistics[probe.name] = FeatureStatistics(
                f=probe_f,
                spread=spread[columns],
                mean=mean[columns],
                mean_square=mean_square[columns],
                variance=variance[columns],
                degrees=degrees,
                shared=shared,
                learned=learned[place],
            )
        return statistics

    def state_dict(self) -> dict[str, Any]:
        """All sums, and the rows that wait to be added, as tensors and primitives; nothing is changed by asking."""
        return {
            "num_classes": self.num_classes,
            **self._sums.state_dict(),
            "exact": {self._probes[index].name: sums.class_sums()._asdict() for index, sums in self._exact.items()},
            "learned": [learned.clone() for learned in self._learned],
            "sample": None if self._sample is None else self._sample.state_dict(),
            "batches": self._batches,
            "waiting": self._buffer.waiting(),
            "unmatched": dict(self.unmatched),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        if "moments" not in state:
            log.warning("the checkpoint is of an earlier version, so the statistics of this epoch start afresh")
            return
        self._sums.load_state_dict(state)
        for index, sums in self._exact.items():
            sums.load(ClassSums(**state["exact"][self._probes[index].name]))
        for own, learned in zip(self._learned, state["learned"], strict=True):
            own.copy_(torch.as_tensor(learned))  # in earlier versions one answer for all features
        self._batches = state["batches"]
        if (sample := state.get("sample")) is not None:  # not in earlier versions
            self._sample = Sample.restored(sample, self._sums.moments.shift.device)
        self.unmatched |= state.get("unmatched", {})  # not in earlier versions
        self._buffer.restore(*state["waiting"])

    def _input_hook(self, index: int) -> Callable[..., None]:
        probe = self._probes[index]

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is probe.module and trains():  # copies of the module have its hooks
                activation = args[0] if args else kwargs["input"]
                self._gather(index, activation, activation, module)
                if index in self._exact:
                    self._weights[index] = probe.module.get_parameter("weight").detach().clone()

        return gather

    def _output_hook(self, index: int) -> Callable[..., None]:
        probe = self._probes[index]

        def gather(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if module is probe.module and trains():
                self._gather(index, output, output, module)

        return gather

    def _gather(self, index: int, activation: Tensor, read: Tensor, module: nn.Module) -> None:
        probe = self._probes[index]
        if activation.layout != torch.strided:
            activation = read = activation.to_dense()
        if self._batches == 0:
            self._learned[index] |= learned_features(read, feature_dimension(read, module))
        values = self._means(activation, module, probe.activation, probe.square, self._tokens)
        # What a trained layer reads is safe: autograd lets nobody change it before the backward pass.
        if values.data_ptr() == activation.data_ptr() and not self._is_saved(index, module, activation):
            values = values.clone()
        self._buffer.put(index, values)

    def _is_saved(self, index: int, module: nn.Module, activation: Tensor) -> bool:
        weight = module._parameters.get("weight")
        kind = activation.device.type
        if torch.is_autocast_enabled(kind) and activation.dtype != torch.get_autocast_dtype(kind):
            return False  # the layer reads, and autograd saves, a copy of lower precision
        return (
            self._probes[index].side == "input"
            and torch.is_grad_enabled()
            and weight is not None
            and weight.requires_grad
        )

    def _drop_unmatched(self, num_labels: int, belong: bool) -> None:
        """Leave out layers that ran on another number of instances, unless all did: then the labels may be wrong."""
        wrong, said = self._buffer.wrong_rows(num_labels), f"instances, but the batch has {num_labels} labels"
        reasons = {self._probes[index].name: f"ran on {rows} {said}" for index, rows in wrong.items()}
        if wrong and len(wrong) == len(self._buffer.ran) and not belong:
            name, reason = next(iter(reasons.items()))
            raise ValueError(
                f"layer {name!r} {reason}; pass labels= a function that returns one label per instance, rank without "
                f'classes (criterion="magnitude"), or leave it out with exclude={name!r}'
            )
        for index in wrong:
            self._buffer.drop(index)
        self.unmatched |= {name: reason for name, reason in reasons.items() if name not in self.unmatched}

    def _flush(self) -> None:
        """Add the steps that wait to the sums."""
        features, labels = self._buffer.take()
        if len(features):
            everything = range(len(self._probes))
            self._sampled().add(features, labels)
            self._sums.add(everything, features, labels, self._batches - len(labels), self._weights)

    def _sampled(self) -> Sample:
        """The sample of this round; the first batch says which features are learned."""
        if self._sample is None:
            given = (~torch.cat(self._learned)).nonzero().flatten()
            device = self._sums.moments.shift.device  # when a fit ends, Lightning moves the model to the CPU
            self._sample = Sample(given.to(device, non_blocking=True))
        return self._sample

    def _check_finite(self, squares: Tensor) -> None:
        for probe, columns in zip(self._probes, self._buffer.columns, strict=True):
            if not bool(torch.isfinite(squares[columns]).all()):
                first = self._sums.first_bad
                where = "on another process" if first is None else f"first in batch {first} of the epoch"
                raise ValueError(
                    f"NaN or inf in the activations at the {probe.side} of layer {probe.name!r}, {where}; nothing was "
                    "pruned. Check the data for NaN, lower the learning rate or clip gradients"
                )
