"""The command line as a user meets it: its help, its mistakes, its dry run, and where its code goes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cluster.cli import COMMANDS, main
from cluster.env import REPOSITORY, runtime_env
from cluster.session import ray_session, refuse_relative_paths
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.errors import UserError
from tests.commands import sharegpt4v, write_images


def test_the_yaml_for_jobs_says_what_drivers_send() -> None:
    said = yaml.safe_load((REPOSITORY / "cluster" / "runtime_env.yaml").read_text())
    said["working_dir"] = str((REPOSITORY / said["working_dir"]).resolve())
    said["py_modules"] = [str(REPOSITORY / module) for module in said["py_modules"]]
    assert said == runtime_env()


def test_alone_it_prints_its_commands_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)


def test_help_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: sharegpt4v COMMAND")


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sharegpt4v 0.")


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["captoin"]) == 2
    assert capsys.readouterr().err == "sharegpt4v: unknown command 'captoin'; did you mean caption\n"


def test_an_unknown_command_like_no_other_is_answered_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == 2
    assert capsys.readouterr().err.endswith(f"known: {', '.join(COMMANDS)}\n")


def test_the_installed_script_is_this_command() -> None:
    script = Path(sys.executable).parent / "sharegpt4v"
    if not script.exists():
        pytest.skip("the package is not installed beside this interpreter")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "caption every image" in done.stdout


def test_help_of_caption_mentions_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["caption", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    missing = [flag for flag in _flags(CaptionConfig) if f"{flag} " not in said and f"{flag}," not in said]
    assert not missing


def _flags(stage: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in stage.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _flags(field.annotation, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-")


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
