"""Storages that fail under a run: what they hold is put off, listed and done later; the rest is done now."""

import json
import subprocess
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from sharegpt4v.captions.layout import CaptionRun
from tests.commands import outcomes_left, rows, write_images

FAKE = ("--engine", "fake", "--fake.image-side", "24")
Caption = Callable[..., "subprocess.CompletedProcess[str]"]
TRIES = 5


class _Web(ThreadingHTTPServer):
    """Files of a folder. `dead` answers 403 until repaired, `late` until dead was asked again."""

    repaired = False
    asked = 0
    valid = 1_000_000
    """Answers until the token expires; then everything is answered 401."""

    def refuses(self, path: str) -> bool:
        self.valid -= 1
        if self.valid < 0:
            return True
        if "dead" in path:
            self.asked += 1
            return not self.repaired
        return "late" in path and self.asked <= TRIES


class _Answer(SimpleHTTPRequestHandler):
    server: _Web

    def do_GET(self) -> None:
        if self.server.refuses(self.path):
            self.send_error(401 if self.server.valid < 0 else 403)
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def web(tmp_path: Path) -> Iterator[_Web]:
    folder = tmp_path / "web"
    write_images(folder, [*(f"{number}.jpg" for number in range(18)), "dead.jpg", "late.jpg"])
    server = _Web(("127.0.0.1", 0), lambda *of: _Answer(*of, directory=str(folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _list(path: Path, names: list[str], port: int) -> Path:
    records = [{"id": name, "image": f"http://127.0.0.1:{port}/{name}"} for name in names]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.faults
def test_one_dead_url_blocks_no_other_image(caption_there: Caption, web: _Web, tmp_path: Path) -> None:
    names = ["dead.jpg", "late.jpg", *(f"{number}.jpg" for number in range(18))]
    run = CaptionRun(tmp_path / "run")
    listed = _list(tmp_path / "list.jsonl", names, web.server_port)
    arguments = ("--images", listed, "--out", run.path, *FAKE)
    done = caption_there(*arguments)
    assert done.returncode == 1
    assert "trying 2 images again whose storage failed" in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("sharegpt4v caption: 1 image could not be read, since the storage failed (")
    assert "dead.jpg" in line and "403" in line and "all others are done" in line
    (row,) = [json.loads(text) for text in run.put_off.read_text().splitlines()]
    assert row["id"] == "dead.jpg" and "403" in row["message"]
    assert not run.success.exists() and outcomes_left(run.path) == 19

    web.repaired = True
    done = caption_there(*arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(rows(run.path, "captions")["id"].to_pylist()) == sorted(names)
    assert run.success.exists() and not run.put_off.exists()


@pytest.mark.faults
def test_a_dead_store_ends_the_run_soon_with_its_cause(caption_there: Caption, tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(60)]
    listed = _list(tmp_path / "list.jsonl", names, port=9)  # where nobody listens
    done = caption_there("--images", listed, "--out", tmp_path / "run", *FAKE)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("sharegpt4v caption: the storage fails, most images of a sample cannot be read: ")
    assert "127.0.0.1:9" in line and line.endswith("run the same command again")
    assert not (tmp_path / "run" / "_SUCCESS").exists() and "Traceback" not in done.stderr


@pytest.mark.faults
def test_a_token_that_expires_on_the_way_costs_no_good_image(
    caption_there: Caption, web: _Web, tmp_path: Path
) -> None:
    names = [f"{number}.jpg?{copy}" for number in range(18) for copy in range(8)]
    listed = _list(tmp_path / "list.jsonl", names, web.server_port)
    run = CaptionRun(tmp_path / "run")
    web.valid = 60
    done = caption_there("--images", listed, "--out", run.path, *FAKE)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "the storage fails" in line and "401" in line
    assert 0 < outcomes_left(run.path) <= 60 and not run.success.exists()

    web.valid = 1_000_000
    done = caption_there("--images", listed, "--out", run.path, *FAKE)
    assert done.returncode == 0, done.stderr
    assert len(rows(run.path, "captions")) == len(names) and len(rows(run.path, "rejects")) == 0
