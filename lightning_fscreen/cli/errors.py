"""What a command says when it fails: one line, and where the rest is."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from hydra.errors import InstantiationException

log = logging.getLogger(__name__)

# Raised with a sentence about what is wrong; of others, the name belongs to the message (KeyError: 'label').
_SENTENCES = (ValueError, OSError, RuntimeError, ImportError)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """End the command with the message of an error, and with exit status 1.

    The traceback goes to the log file of the run. With HYDRA_FULL_ERROR=1 in the environment, as for other
    Hydra applications, it is shown.

    Raises:
        SystemExit: there was an error.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
        for handler in files:
            trace = (type(error), error, error.__traceback__)
            handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run failed", (), trace))
        where = "".join(f"in {handler.baseFilename}, and " for handler in files)
        print(f"The traceback is {where}shown with HYDRA_FULL_ERROR=1.", file=sys.stderr)
        print(f"fscreen: error: {describe(error)}", file=sys.stderr)
        raise SystemExit(1) from error


def describe(error: BaseException) -> str:
    """The message; of an object that could not be made, that of the reason and the place in the configuration."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        place = str(error).rpartition("full_key: ")[2]
        return f"{describe(error.__cause__)} (configuration: {place})"
    text = str(error).strip()
    return text if text and isinstance(error, _SENTENCES) else f"{type(error).__name__}: {text}"
