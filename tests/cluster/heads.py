"""Ray clusters for the tests, started by `ray start --head` as an operator would, on ports of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Head:
    """address: of its control store, HOST:PORT. jobs: URL of its job server, when it has one."""

    address: str
    jobs: str


def bare_python(folder: Path) -> Path:
    """An interpreter that has every package of this one, except ours.

    On a cluster our code has to come with the runtime environment. Nodes that ran the interpreter of the
    tests would find it through the editable install and hide a mistake. The path files (*.pth) of a folder
    named in a path file are not read, and an editable install is one of those.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    installed = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "installed.pth").write_text("\n".join(installed) + "\n")
    return folder / "bin" / "python"


@contextmanager
def head(python: Path, base: dict[str, str], *, job_server: bool) -> Iterator[Head]:
    """`ray start --head --block` in a process group that is killed as a whole afterwards.

    Asked politely Ray drains for half a minute. Session files go to a short path: their sockets' names
    may have 107 characters.
    """
    control, dashboard, agent, client = _free_ports(4)
    sessions = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    ports = ["--port", control, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    ports += ["--ray-client-server-port", client, "--min-worker-port", "0", "--max-worker-port", "0"]
    where = {key: value for key, value in base.items() if key != "PYTHONPATH"}
    where["PATH"] = f"{python.parent}{os.pathsep}{where['PATH']}"
    log = sessions / "head.log"
    with ExitStack() as after, log.open("w") as output:
        after.callback(shutil.rmtree, sessions, ignore_errors=True)
        process = subprocess.Popen(
            [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", *ports]
            + ["--node-ip-address", "127.0.0.1", "--temp-dir", str(sessions), "--num-cpus", "4"]
            + ["--object-store-memory", str(200 * 2**20), "--disable-usage-stats"]
            + ["--include-dashboard", str(job_server).lower()],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=sessions,
            env=where,
            start_new_session=True,
        )
        after.callback(process.wait)
        after.callback(os.killpg, process.pid, signal.SIGKILL)
        _wait_until_started(process, log)
        yield Head(f"127.0.0.1:{control}", f"http://127.0.0.1:{dashboard}")


def _free_ports(count: int) -> list[str]:
    """Ports nobody listens on now; all are open at once, so that none comes twice."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def _wait_until_started(process: "subprocess.Popen[bytes]", log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
