"""The command line as a user meets it: its help, its mistakes, its dry run, and where its code goes."""

import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Literal

import pytest
import yaml

from cluster.cli import COMMANDS, application, main
from cluster.session import ray_session, refuse_relative_paths
from sharegpt4v.errors import UserError
from tests.commands import REPOSITORY, command, environment, sharegpt4v, write_images


def test_alone_it_prints_its_commands_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(f"│ {name} " in said for name in COMMANDS)


def test_help_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Usage: sharegpt4v COMMAND")
    assert said.splitlines()[2] == "Caption, train, evaluate and serve ShareGPT4V on Ray."


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sharegpt4v 0.")


@pytest.mark.parametrize("argv", [["captoin"], ["help", "captoin"]])
def test_an_unknown_command_is_answered_with_the_nearest(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert 'Did you mean "caption"?' in said and said.count("\n") == 1


def test_an_unknown_command_like_no_other_is_answered_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_with_a_command_is_that_commands_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", name]) == 0
    said = capsys.readouterr().out
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out == said and said.startswith(f"Usage: sharegpt4v {name} ")


HEAVY = {"ray", "torch", "transformers", "pyarrow", "numpy"}


def _imported(*arguments: str) -> "tuple[str, set[str]]":
    """What `python ARGUMENTS` prints, and all that it imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.stdout, {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "argv", [["--help"], *([name, "--help"] for name in COMMANDS), ["caption"], ["caption", "--limit", "0"]]
)
def test_help_and_mistakes_need_none_of_the_heavy_imports(argv: list[str]) -> None:
    imported = _imported("-m", "cluster.cli", *argv)[1]
    assert "cyclopts" in imported and not imported & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_run_as_a_module_has_its_help_as_fast(name: str) -> None:
    said, imported = _imported("-m", COMMANDS[name], "--help")
    assert said.startswith(f"Usage: sharegpt4v {name} ")
    assert "cyclopts" in imported and not imported & HEAVY


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_nested_flags_and_choices(shell: Literal["bash", "zsh", "fish"]) -> None:
    said = application().generate_completion(shell=shell)
    assert all(word in said for word in ("caption", "decoding.max-new-tokens", "webdataset"))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["exp"], ["export"]),
        (["caption", "--decoding.re"], ["repetition-penalty", "retry-temperature", "retry-top-p"]),
        (["export", "--format", ""], ["llava-json", "messages", "hf", "webdataset"]),
        (["help", "ca"], ["caption"]),
    ],
)
def test_bash_completes(words: list[str], offered: list[str], tmp_path: Path) -> None:
    script = tmp_path / "complete"
    typed = 'COMP_WORDS=(sharegpt4v "$@"); COMP_CWORD=$#; _sharegpt4v; printf "%s\\n" "${COMPREPLY[@]}"'
    script.write_text(f"{application().generate_completion(shell='bash')}\n{typed}\n")
    done = subprocess.run(["bash", script, *words], capture_output=True, text=True, timeout=60)
    found = [line.strip().removeprefix("--decoding.") for line in done.stdout.splitlines()]
    assert found == offered, done.stderr


def test_the_installed_script_is_this_command() -> None:
    script = Path(sys.executable).parent / "sharegpt4v"
    if not script.exists():
        pytest.skip("the package is not installed beside this interpreter")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Caption every image" in done.stdout


def test_a_dry_run_prints_the_resolved_configuration_and_writes_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.jpg"])
    run = tmp_path / "run"
    flags: list[str | Path] = [
        "--images",
        tmp_path / "images",
        "--out",
        run,
        "--engine",
        "fake",
        "--decoding.temperature",
        "0.5",
    ]
    done = sharegpt4v("caption", *flags, "--dry-run")
    assert done.returncode == 0, done.stderr
    said = yaml.safe_load(done.stdout)  # the plan is in comments
    assert said["decoding"]["temperature"] == 0.5 and said["actors"] == "auto"
    assert f"# begins a new run in {run}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_inside_a_job_relative_paths_are_refused_by_their_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_relative_paths(images="photos", out=Path("run"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    refuse_relative_paths(images="s3://bucket/photos", root=None, out=Path("/shared/run"))
    with pytest.raises(UserError, match="^--out run is relative.*give an absolute path"):
        refuse_relative_paths(images="/photos", out=Path("run"))


def test_the_address_of_a_job_server_is_refused_with_the_command_for_it() -> None:
    with pytest.raises(UserError, match="ray job submit --address http://head:8265 --runtime-env"):
        with ray_session("http://head:8265"):
            pass


def test_a_reader_that_leaves_early_is_no_failure(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.jpg"])
    words = command("caption", "--images", str(tmp_path), "--out", str(tmp_path / "run"), "--dry-run")
    with Popen(words, cwd=REPOSITORY, env=environment(), stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "rror" not in process.stderr.read()
        assert process.wait(30) == 128 + signal.SIGPIPE
