"""Does a smaller network compute the same function? Answered in float64, before it is kept."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_fscreen.functional.precision import without_tf32
from lightning_fscreen.modules import in_mode, named_tensors, places_by_name
from lightning_fscreen.randomness import seeded
from lightning_fscreen.slimming.capture import plain_norms, plain_outputs
from lightning_fscreen.slimming.chance import SameChance
from lightning_fscreen.slimming.double import Exact, InDouble, let_go, own_eps, to_double
from lightning_fscreen.slimming.escapes import returning_escapes
from lightning_fscreen.slimming.examples import first_instance, shuffled, smaller, with_noise
from lightning_fscreen.slimming.modes import without_mode

log = logging.getLogger(__name__)

_TOLERANCE = 1e-9  # relative, in float64
_TRAIN_TOLERANCE = 1e-6  # likewise, in train mode: batch norms over two instances amplify rounding
_OWN_TOLERANCE = 1e-4  # relative, for networks that cannot run in float64; at least so many rounding steps:
_OWN_STEPS = 16


# How a network runs: with parameters that are converted to float64 where operators use them; where code that Python
# does not see needs them, too, with copies of all in float64; and as it is.
_AS_USED, _COPIED, _OWN = _WAYS = ("float64", "float64, copied", "its own dtype")


class VerificationError(RuntimeError):
    """The slimmed network would not compute the same function; the network was left as it was."""


class OtherSizeError(VerificationError):
    """It would at the sizes of the example, but not at others."""


@dataclass(frozen=True)
class _Run:
    """One pass: its inputs, and its mode, None where forward does not ask for it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool | None

    @property
    def mode(self) -> str:
        """In words."""
        return {True: "train", False: "eval", None: "train or eval"}[self.training]


class Verification:
    """Outputs of a network before it is changed, on examples and on noise.

    They are computed in float64; a network that insists on another dtype (`x.float()` in forward) is run in its own. A
    network whose forward does not ask whether it is trained runs once for both modes; without batch norms one instance
    is enough in train mode, since eval mode sees all of them.

    Args:
        network: the network, not yet changed.
        args: example inputs.
        kwargs: example keyword inputs.
        training: whether its outputs in train mode must stay the same as well (without dropout), if it runs in it.
        escapes: what else are outputs, as of `Capture`.

    Raises:
        VerificationError: the network does not run on its own example, or all that it gives is NaN.
    """

    def __init__(
        self,
        network: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool = False,
        escapes: Collection[str] = (),
    ) -> None:
        self._network, self._escapes = network, set(escapes)
        self._elsewhere: list[tuple[_Run, list[Any]]] = []  # at other sizes, and the outputs there
        self._device: torch.device | None
        reason = self._note_outputs(with_noise((args, kwargs)), args, kwargs, training)
        if reason is not None:
            instead = self._note_outputs(shuffled((args, kwargs)), args, kwargs, training)
            if instead is not None:
                raise instead

    def _note_outputs(
        self, examples: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
    ) -> VerificationError | None:
        """Note the outputs on some inputs in eval mode, and on the example in train mode, in the first way that works.

        Returns:
            Why none does; None if one does.
        """
        network = self._network
        evaluation = [_Run(given, named, False) for given, named in examples]
        attempts = [(evaluation, way) for way in _WAYS]
        if training:
            once = [replace(run, training=None) for run in evaluation]
            both = [_Run(args, kwargs, True), *evaluation]
            attempts = [(once, _AS_USED), *((both, way) for way in _WAYS), *attempts]
            if not any(isinstance(module, _BatchNorm) for module in network.modules()):  # which need more instances
                first, named = first_instance((args, kwargs))
                attempts.insert(1, ([_Run(first, named, True), *evaluation], _AS_USED))
        reason: Exception | None = None
        silent = False
        for self._runs, self._way in attempts:
            self._device = None  # the network's own
            try:
                self._before = self._run_where_there_is_room({})
            except Exception as error:  # whatever forward raises
                let_go(error)
                reason = error
                modes = " and ".join(dict.fromkeys(run.mode for run in self._runs))
                log.info("%s does not run in %s mode in %s: %s", type(network).__name__, modes, self._way, error)
                continue
            if _says_something([output for run in self._before for output in run]):
                return None
            silent = True  # in float64, for instance, where forward writes its own dtype's least number into a mask
        if silent:
            return VerificationError(
                f"all outputs of {type(network).__name__} are NaN or infinite, on its example as on noise, so "
                "nothing can be verified; look for NaN among its weights"
            )
        failure = VerificationError(f"{type(network).__name__} fails on its example: {reason}")
        failure.__cause__ = reason
        return failure

    def look_elsewhere(self) -> None:
        """Compare at other sizes, too, at those at which the network runs: one position less in each dimension."""
        for args, kwargs in smaller((self._runs[-1].args, self._runs[-1].kwargs)):
            run = replace(self._runs[-1], args=args, kwargs=kwargs)
            try:
                outputs = self._run_all({}, [run])[0]
            except Exception as error:  # whatever forward raises
                let_go(error)
                continue
            if _says_something(outputs):
                self._elsewhere.append((run, outputs))

    def stay_here(self) -> None:
        """Compare at the sizes of the example alone."""
        self._elsewhere.clear()

    def check(self, exact: Mapping[str, Exact]) -> None:
        """Compare with the outputs of the network as it is now.

        Args:
            exact: values of tensors by name, more exact than those in the network.

        Raises:
            VerificationError: the outputs differ, or forward fails; an `OtherSizeError` if that is so at other sizes
                alone.
        """
        name = type(self._network).__name__
        try:
            after = self._run_where_there_is_room(exact)
        except Exception as error:  # whatever forward raises
            let_go(error)
            raise VerificationError(
                f"forward of {name} fails on the smaller network, so nothing was removed; it depends on sizes in a way "
                f"that the captured graph does not show: {type(error).__name__}: {error}"
            ) from error
        for run, first, second in zip(self._runs, self._before, after, strict=True):
            difference = _difference(first, second)
            if not difference <= self._tolerance(run, first):
                raise VerificationError(
                    f"slimming {name} would change its outputs by {difference:.1e} (relative) in "
                    f"{run.mode} mode, so nothing was removed; its forward does something that the captured graph does "
                    "not show"
                )
        for run, outputs in self._elsewhere:
            try:
                difference = _difference(outputs, self._run_all(exact, [run])[0])
            except Exception as error:  # whatever forward raises
                let_go(error)
                difference = float("inf")
            if not difference <= self._tolerance(run, outputs):
                leaves = pytree.tree_leaves((run.args, run.kwargs))
                sizes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
                raise OtherSizeError(
                    f"slimming {name} would change its outputs by {difference:.1e} (relative) on inputs of the sizes "
                    f"{sizes}, other than those of the example"
                )

    def _tolerance(self, run: _Run, outputs: list[Any]) -> float:
        if self._way == _OWN:
            return max([_OWN_TOLERANCE, *(_OWN_STEPS * _step(output) for output in outputs)])
        return _TRAIN_TOLERANCE if run.training else _TOLERANCE

    def rehearse(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> None:
        """Run the network as it is now, on these inputs; nothing of it changes by that."""
        copies = named_tensors(self._network) if self._way == _COPIED else dict(self._network.named_buffers())
        copies = {name: self._convert(tensor) for name, tensor in copies.items()}
        self._run(_Run(args, kwargs, training), copies, {})

    def _run_where_there_is_room(self, exact: Mapping[str, Exact]) -> list[list[Any]]:
        """On the network's own device; on the CPU if that has no room for it."""
        try:
            return self._run_all(exact)
        except torch.OutOfMemoryError as error:
            if self._way != _AS_USED:
                raise
            let_go(error)
            log.info("%s is verified on the CPU: %s", type(self._network).__name__, error)
        self._device = torch.device("cpu")
        return self._run_all(exact)

    def _run_all(self, exact: Mapping[str, Exact], runs: Sequence[_Run] | None = None) -> list[list[Any]]:
        copies = named_tensors(self._network) if self._way == _COPIED else dict(self._network.named_buffers())
        copies = {name: self._convert(tensor, exact.get(name)) for name, tensor in copies.items()}
        return [self._run(run, copies, exact) for run in (self._runs if runs is None else runs)]

    def _run(self, run: _Run, copies: Mapping[str, Tensor], exact: Mapping[str, Exact]) -> list[Any]:
        parameters = {name for name, _ in self._network.named_parameters()}
        # Copies, because forward may write to buffers and inputs.
        own = {name: tensor if name in parameters else tensor.clone() for name, tensor in copies.items()}
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda tensor: self._convert(tensor).clone(), (run.args, run.kwargs)
        )
        devices = {tensor.device for tensor in pytree.tree_leaves((own, args, kwargs)) if _is_elsewhere(tensor)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # To compile it for float64 and two sizes would take longer than everything else.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(in_mode(self._network, bool(run.training)))
            if run.training is None:
                stack.enter_context(without_mode(self._network))
            stack.enter_context(plain_norms(self._network))
            stack.enter_context(plain_outputs(self._network))
            stack.enter_context(returning_escapes(self._network, only=self._escapes))
            stack.enter_context(own_eps(self._network))
            # Noise must be the same before and after; some networks draw it in eval mode, too.
            stack.enter_context(seeded(0, devices))
            stack.enter_context(SameChance())
            if self._way == _AS_USED:
                stack.enter_context(InDouble(self._network, exact, self._device))
            elif self._way == _OWN:
                stack.enter_context(without_tf32())
            # Every place once: with two names for one, torch would not put back what was there.
            places = places_by_name(self._network)
            own = {place: tensor for name, tensor in own.items() for place in places[name]}
            call = partial(torch.func.functional_call, tie_weights=False)
            return pytree.tree_leaves(call(self._network, own, args, kwargs))

    def _convert(self, tensor: Tensor, exact: Exact | None = None) -> Tensor:
        if self._way == _OWN or not tensor.is_floating_point():
            return tensor.detach().to(self._device or tensor.device)
        return to_double(tensor.detach(), exact, self._device)


def _is_elsewhere(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _step(output: Any) -> float:
    return torch.finfo(output.dtype).eps if isinstance(output, Tensor) and output.is_floating_point() else 0.0


def _says_something(outputs: list[Any]) -> bool:
    """Whether there is anything to compare; outputs without numbers are compared as they are."""
    numbers = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point() and each.numel()]
    return not numbers or any(bool(each.isfinite().any()) for each in numbers)


def _difference(first: list[Any], second: list[Any]) -> float:
    """Largest relative difference of two lists of outputs; inf where they cannot be compared."""
    if len(first) != len(second):
        return float("inf")
    return max((_leaf_difference(a, b) for a, b in zip(first, second, strict=True)), default=0.0)


def _leaf_difference(first: Any, second: Any) -> float:
    if not isinstance(first, Tensor):
        return 0.0 if type(first) is type(second) and first == second else float("inf")
    if isinstance(second, Tensor):
        first = first.to(second.device)  # the first one, where only the second had to run on the CPU
    if not isinstance(second, Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return float("inf")
    if not first.is_floating_point():
        return 0.0 if torch.equal(first, second) else float("inf")
    finite = torch.isfinite(first)
    if not torch.equal(finite, torch.isfinite(second)) or not torch.equal(
        first[~finite].nan_to_num(), second[~finite].nan_to_num()
    ):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = first[finite].abs().max().clamp(min=1e-30)
    return float((first[finite] - second[finite]).abs().max() / scale)
