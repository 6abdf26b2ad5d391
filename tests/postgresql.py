"""A PostgreSQL server of its own for as long as a test needs one, where PostgreSQL is installed."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Server:
    """A server that a test may stop and start."""

    def __init__(self, folder: Path, call: Callable[..., None]) -> None:
        self.url = f"postgresql://postgres:secret@/postgres?host={folder}"
        self._folder = folder
        self._call = call

    def start(self) -> None:
        self._call(
            "pg_ctl",
            "start",
            "--wait",
            "--log",
            str(self._folder / "log"),
            "--options",
            f"-k {self._folder} -c listen_addresses='' -c fsync=off",
        )

    def stop(self) -> None:
        self._call("pg_ctl", "stop", "--mode=immediate")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database; the test is skipped where there is no PostgreSQL."""
    with stoppable_server() as running:
        yield running.url


@contextlib.contextmanager
def stoppable_server() -> Iterator[Server]:
    """A server with an empty database; the test is skipped where there is no PostgreSQL.

    It listens on a socket in its own folder alone, whose path must be short, and refuses to run
    as root.
    """
    initdb = shutil.which(
        "initdb",
        path=os.pathsep.join(
            [*map(str, Path("/usr/lib/postgresql").glob("*/bin")), os.environ["PATH"]]
        ),
    )
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    tools = Path(initdb).resolve().parent
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    if user:
        shutil.chown(folder, user)

    def call(tool: str, *arguments: str) -> None:
        subprocess.run(
            [tools / tool, "-D", folder / "data", *arguments],
            check=True,
            user=user,
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )

    try:
        call("initdb", "--auth=trust", "--username=postgres", "--no-sync")
        running = Server(folder, call)
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder)
