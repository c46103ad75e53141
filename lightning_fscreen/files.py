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


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of safetensors: eight bytes for the length of the header, and its JSON."""
    with Path(path).open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_torch_save(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of `torch.save`: an archive, or a pickle as of old."""
    with Path(path).open("rb") as file:
        start = file.read(9)
    if start[4:] == b"\0\0\0\0{":  # of safetensors: the length of the header, which may be any number, and the header
        return False
    return start[:4] == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x04")
