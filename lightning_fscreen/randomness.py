"""Global random numbers as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Global random numbers are afterwards what they were before, also after an error."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)  # told of an error, it would not put them back
