"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write beside a file, and rename when that has gone well.

    A full disk, an error or a kill leaves the earlier file under its own name; after an error nothing else
    is left, after a kill a hidden `.partial` file.

    Yields:
        The path to write to, in the same folder and with the same suffix.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} does not exist")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or else a power failure could leave the name without the contents
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
