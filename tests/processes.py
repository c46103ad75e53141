"""New processes for the tests, forked from one that has imported everything: those seconds are paid once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["lightning_fscreen.cli.bench", "sklearn.datasets"])


def run_ranks(number: int, target: Callable[..., None], *arguments: Any, seconds: float = 300) -> None:
    """Call a function of a module in so many new processes at once, where Lightning and torch find their ranks.

    The first error of any of them is raised here, and ends the others.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(number)}
    calls = [(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, target, arguments) for rank in range(number)]
    with CONTEXT.Pool(number) as pool:
        ended = pool.imap_unordered(_run_rank, calls)
        for _ in calls:
            ended.next(seconds)


def _run_rank(call: tuple[dict[str, str], Callable[..., None], tuple[Any, ...]]) -> None:
    environment, target, arguments = call
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)


def run_command(
    main: Callable[[], Any], folder: Path, *arguments: str, seconds: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Call the entry point of a command in a new process and in a folder, to which its output goes, too."""
    said = folder / "stdout.txt", folder / "stderr.txt"
    process = CONTEXT.Process(
        target=_run_command, args=(main, folder, arguments, {**os.environ, **environment}, said), daemon=True
    )
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{arguments} took more than {seconds} seconds")
    return subprocess.CompletedProcess(list(arguments), process.exitcode, *(path.read_text() for path in said))


def _run_command(
    main: Callable[[], Any],
    folder: Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    said: tuple[Path, Path],
) -> None:
    for descriptor, path in enumerate(said, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["fscreen", *arguments]
    main()


class Forked:
    """What `subprocess.Popen` is to a command that begins with the interpreter, without its imports."""

    def __init__(self, command: list[str], stdout: Any, stderr: Any, env: dict[str, str], **_: Any) -> None:
        assert command[0] == sys.executable and stdout is stderr
        arguments = command[1:], os.getcwd(), dict(env), Path(stdout.name)
        self._process = CONTEXT.Process(target=_run_program, args=arguments, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds: float | None = None) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", seconds or 0)
        return int(self._process.exitcode)


def _run_program(arguments: list[str], folder: str, environment: dict[str, str], said: Path) -> None:
    os.setsid()
    with said.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
