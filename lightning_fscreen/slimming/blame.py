"""Which parts are to blame where all of them together do not work, found out by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Groups = Sequence[Sequence[str]]


def culprits(groups: Groups, works: Callable[[Groups], bool]) -> list[str]:
    """The names in those groups that do not work alone.

    Halves are tried, then halves of those that do not work: of n groups, k of them to blame, some 2 k·log₂ n trials.

    Args:
        groups: names that are tried together; all of them do not work.
        works: whether some of the groups do, without the others.
    """
    if len(groups) < 2:
        return [name for names in groups for name in names]
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    return [name for half in halves if not works(half) for name in culprits(half, works)]
