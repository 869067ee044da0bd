"""The code in docs/ runs, its commands parse, and the pages build without a warning and load nothing."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster.cli import COMMANDS, main
from cluster.command_line import commands_of, run_command
from sharegpt4v.captions.finish import summarise
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.settle import Counts
from sharegpt4v.config.base import flat_fields
from tests.captions import fake_run
from tests.commands import REPOSITORY, environment
from tests.test_ci import TARGETS

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RUN = Path("runs") / "first"
"""The finished run that pages read."""


def _blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language: lines before the first one of their text, and the text."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def _script(page: Path) -> str:
    """The Python blocks of a page, in the lines where they stand: a traceback then names those."""
    lines: list[str] = []
    for before, text in _blocks(page, "python"):
        lines += [""] * (before - len(lines)) + text.splitlines()
    return "\n".join(lines)


def _finished_run(run: Path) -> None:
    rows = [fake_run.caption(name, f"{name} shows a boat on a lake.") for name in ("one", "two", "three")]
    fake_run.write_run(run, rows, [fake_run.reject("four", "missing")])


@pytest.mark.parametrize(
    "page", [page for page in PAGES if _blocks(page, "python")], ids=lambda page: page.stem
)
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    _finished_run(tmp_path / RUN)
    code = f"exec(compile({_script(page)!r}, {str(page)!r}, 'exec'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line, shown in _blocks(page, "text"):
        assert shown in done.stdout, f"{page}:{line + 1}: {done.stdout}"


def _shell_lines() -> list[str]:
    return [line for page in PAGES for _, block in _blocks(page, "sh") for line in block.splitlines()]


@pytest.mark.parametrize("line", _shell_lines())
def test_commands_and_flags_of_the_pages_exist(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, name, *arguments = shlex.split(line)
    if program == "make":
        assert name in TARGETS
        return
    assert program == "sharegpt4v" and name in COMMANDS
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for _, text in _blocks(page, "yaml"):
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
    if "--help" in arguments:
        assert main([name, *arguments]) == 0
        return
    command = dataclasses.replace(importlib.import_module(COMMANDS[name]).COMMAND, plan=None)
    assert run_command(command, [*arguments, "--dry-run"]) == 0, capsys.readouterr().err
    assert yaml.safe_load(capsys.readouterr().out)


def test_every_key_of_a_summary_is_explained(tmp_path: Path) -> None:
    _finished_run(tmp_path / RUN)
    keys = set(json.loads((tmp_path / RUN / "summary.json").read_text()))
    (tmp_path / "new").mkdir()
    keys |= summarise(CaptionRun(tmp_path / "new"), Counts(), [], {}, started=time.time()).keys()
    text = (DOCS / "run_folder.md").read_text(encoding="utf-8")
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_every_file_that_is_named_exists() -> None:
    named = [
        path for page in PAGES for path in re.findall(r"`((?:platform|pipelines)/[\w./]+)`", page.read_text())
    ]
    assert len(named) > 5
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("sphinx is not installed: make setup")
    out = tmp_path_factory.mktemp("docs")
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(out / "cache")]
    done = subprocess.run(
        [*words, "-b", "html", str(DOCS), str(out / "html")],
        cwd=out,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_the_pages_load_nothing_from_elsewhere(built: Path) -> None:
    """A link may lead anywhere; what a browser would fetch by itself is beside the page."""
    loads = re.compile(
        r"<(?!a\b)[^>]*?\b(?:src|href|srcset|data|action)=\"(?:https?:)?//[^\"]*|url\([\"']?(?:https?:)?//"
    )
    files = [*built.rglob("*.html"), *built.rglob("*.css")]
    assert len(files) > len(PAGES)
    found = {file.name: hits for file in files if (hits := loads.findall(file.read_text(encoding="utf-8")))}
    assert found == {}


def test_the_pages_have_every_field_and_every_preset(built: Path) -> None:
    page = re.sub(r"<[^>]*>", "", (built / "configuration.html").read_text(encoding="utf-8"))
    for module in COMMANDS.values():
        for command in commands_of(importlib.import_module(module).COMMAND):
            config_class = command.config_class
            names = [*(dotted for dotted, _, _ in flat_fields(config_class)), *config_class.presets]
            assert [name for name in names if name not in page] == []
