"""Flags as a user gives them: layers, values, help, mistakes, and how a command ends."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.command_line import Command, error_line, run_command
from sharegpt4v.config.base import flat_fields
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.config.check import CheckConfig
from sharegpt4v.errors import RunFailed, UserError


def run(
    *given: str, action: Callable[[CaptionConfig], int] | None = None
) -> tuple[int, CaptionConfig | None]:
    seen: list[CaptionConfig] = []

    def keep(config: CaptionConfig) -> int:
        seen.append(config)
        return action(config) if action else 0

    code = run_command(Command("caption", CaptionConfig, keep), ["--images", "x", "--out", "y", *given])
    return code, seen[0] if seen else None


def resolved(*given: str) -> CaptionConfig:
    code, config = run(*given)
    assert code == 0 and config is not None
    return config


def test_a_flag_not_given_leaves_preset_and_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: 7b\nbatch_size: 8\ndecoding: {top_p: 0.5, max_new_tokens: 7}\n")
    config = resolved("--config", str(file), "--decoding.max-new-tokens", "9")
    assert (config.decoding.max_new_tokens, config.decoding.top_p) == (9, 0.5)
    assert (config.decoding.repetition_penalty, config.batch_size) == (1.5, 8)


def test_the_preset_flag_wins_over_the_files(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: 7b\n")
    assert resolved("--config", str(file)).gpus_per_actor == 1
    assert resolved("--config", str(file), "--preset", "toy").gpus_per_actor == 0


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        (["--retry-rejects"], "retry_rejects", "all"),
        (["--retry-rejects", "--debug"], "retry_rejects", "all"),
        (["--retry-rejects", "truncated"], "retry_rejects", "truncated"),
        (["--dedupe-image"], "dedupe_image", True),
        (["--no-dedupe-image"], "dedupe_image", False),
        (["--root", "none"], "root", "none"),
        (["--root", "s3://bucket//photos/"], "root", "s3://bucket//photos/"),
        (["--prompt="], "prompt", ""),
        (["--prompt=-- what?"], "prompt", "-- what?"),
        (["--limit=3"], "limit", 3),
        # The last one counts, so that a script's flags can be changed by appending others.
        (["--limit", "1", "--limit", "2"], "limit", 2),
        (["--engine", "fake", "--engine", "torch"], "engine", "torch"),
        (["--dedupe-image", "--no-dedupe-image"], "dedupe_image", False),
        (["--retry-rejects", "--retry-rejects", "truncated"], "retry_rejects", "truncated"),
        (["--retry-rejects", "truncated", "--retry-rejects"], "retry_rejects", "all"),
        (["--protocol", "pad"], "protocol", "pad"),
    ],
)
def test_a_flag_becomes_its_field(given: list[str], field: str, value: Any) -> None:
    assert getattr(resolved(*given), field) == value


def test_a_dictionary_is_json() -> None:
    assert resolved("--fake.faults", '{"hang": "a.*"}').fake.faults == {"hang": "a.*"}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--limt", "3"], "Unknown option: --limt. Did you mean --limit?"),
        (["--decoding.max-tokens", "3"], "Did you mean --decoding.max-new-tokens?"),
        (["--limit", "0"], "--limit: '0' is refused: it should be greater than or equal to 1"),
        (["--limit", "many"], "--limit: 'many' is refused: it should be a valid integer"),
        (["--engine", "torc"], 'Did you mean "torch"?'),
        (["--fake.faults", "{a"], "Invalid value for --fake.faults: '{a' is not JSON"),
        (
            ["--decoding.min-new-tokens", "9", "--decoding.max-new-tokens", "8"],
            "--decoding.min-new-tokens: '9' is refused: --decoding.max-new-tokens is 8",
        ),
        (["--limit"], "--limit requires an argument"),
        (["--config", "none.yaml"], "--config: cannot read none.yaml"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(
    given: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, config = run(*given)
    said = capsys.readouterr().err
    assert (code, config) == (2, None)
    assert said.startswith("sharegpt4v caption: ") and line in said and said.count("\n") == 1


def test_all_that_is_missing_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Command("caption", CaptionConfig, lambda _: 0), []) == 2
    assert capsys.readouterr().err == "sharegpt4v caption: --images: required, and so is --out\n"


@pytest.mark.parametrize("text", ["decoding: {top_p: 7}", "decoding: {top_pp: 0.7}"])
def test_a_mistake_of_the_file_names_the_file_and_one_of_a_flag_does_not(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert run("--config", str(file))[0] == 2
    assert f"(in {file})" in capsys.readouterr().err
    assert run("--config", str(file), "--decoding.top-p", "7")[0] == 2
    assert ("(in" in capsys.readouterr().err) == ("top_pp" in text)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: CaptionConfig) -> int:
        raise RunFailed("lower `batch_size` or `max_new_tokens`")

    assert run(action=fail)[0] == 1
    assert capsys.readouterr().err == "sharegpt4v caption: lower --batch-size or --decoding.max-new-tokens\n"
    assert run("--debug", action=fail)[0] == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130() -> None:
    def interrupt(config: CaptionConfig) -> int:
        raise KeyboardInterrupt

    assert run(action=interrupt)[0] == 130


def test_fields_an_error_names_become_flags_of_this_command() -> None:
    error = UserError("0 is too few: leave `max_new_tokens` or `nobody` out", field="requests_at_once")
    expected = "--fake.requests-at-once: 0 is too few: leave --decoding.max-new-tokens or `nobody` out"
    assert error_line(error, CaptionConfig) == expected
    assert error_line(error, CheckConfig) == str(error)


@pytest.mark.parametrize("argument", ["capacity", "image_size"])
def test_an_argument_of_an_engine_is_no_flag_of_the_fake_one(argument: str) -> None:
    assert error_line(UserError("0 is too few", field=argument), CaptionConfig).startswith(argument)


@pytest.mark.parametrize("columns", ["80", "120", "200"])
def test_help_lists_every_field_unbroken_under_its_heading(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["caption", "--help"]) == 0
    said = capsys.readouterr().out
    listed = set(re.findall(r"^│ (--\S+)", said, re.MULTILINE))
    assert {f"--{name.replace('_', '-')}" for name, _, _ in flat_fields(CaptionConfig)} <= listed
    assert re.findall(r"^╭─ ([\w ]+) ─", said, re.MULTILINE) == [
        *("Required", "Input", "Model", "Decoding", "Gate", "Output", "Ray", "Testing"),
        *("Presets", "Every command"),
    ]


def test_help_shows_what_each_preset_sets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["caption", "--help"])
    said = capsys.readouterr().out
    assert "│ 7b: Share-Captioner on GPUs" in said and "--model must name its folder" in said
    # The values keep their indentation, and no flag is parted from its value.
    for line in (
        "  --decoding.max-new-tokens 500 --decoding",
        "  --gate.min-characters 60",
        "  --batch-size 192",
    ):
        assert f"│ {line}" in said
