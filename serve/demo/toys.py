"""Both toy models served in a process beside the page, so that one command shows everything."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sharegpt4v.errors import RunFailed

READY = "ready: "
_END_SECONDS = 10


class ToyApi:
    """The server's process, which loads its models while the page's own libraries are loaded."""

    def __init__(self) -> None:
        serve = [sys.executable, "-m", "cluster.cli", "serve", "--without-ray", "--port", "0"]
        self._process = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)

    def url(self) -> str:
        """Waits until the models answer; returns where. Raises RunFailed when the server ended before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(READY):
                return line.removeprefix(READY).split()[0].removesuffix("/v1")
        raise RunFailed(f"the server of the toy models ended with code {self._process.wait()}")

    def end(self) -> None:
        """Ends the server; after a Ctrl-C, which it has seen as well, it may have ended."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def toy_api() -> Iterator[ToyApi]:
    """Starts the server and ends it on leaving."""
    api = ToyApi()
    try:
        yield api
    finally:
        api.end()
