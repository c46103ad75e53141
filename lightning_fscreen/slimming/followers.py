"""Copies of a network on their way to become smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.slimming.planning import Change
from lightning_fscreen.slimming.verify import Verification, VerificationError


class Follower:
    """A copy of a network on its way to become smaller."""

    def __init__(
        self, copy: Copy, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
    ) -> None:
        self.copy, self._network = copy, network
        with copy.worn_by(network):
            self._verification = Verification(network, args, kwargs, training)

    def plan(self, change: Callable[[], Change], own: Change) -> None:
        """Find its new tensors.

        Raises:
            VerificationError: it would be cut in another way than the network, or constants of its own would go into
                a layer that it shares with the network.
        """
        with self.copy.worn_by(self._network):
            self.change = change()
        if not self.change.plan.is_like(own.plan):
            raise VerificationError(
                f"{self.copy.name} would lose other channels than the network that it is a copy of, because values "
                "that are constant there are not constant here; it cannot follow"
            )
        for name, exact in self.change.exact.items():
            if not self.copy.has(name) and not exact.is_close(own.exact.get(name)):
                raise VerificationError(
                    f"constants of {self.copy.name} would have to be carried into {name!r}, which is no part of the "
                    "copy; it cannot follow"
                )

    def check(self) -> None:
        """Verify the copy, which has become smaller, as the network has."""
        with self.copy.worn_by(self._network):
            try:
                self._verification.check(self.change.exact)
            except VerificationError as error:
                raise VerificationError(f"{self.copy.name}: {error}") from error
