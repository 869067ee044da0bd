"""The run folder: its layout, its `run.yaml`, and the fingerprint that guards a resume.

run.yaml      resolved configuration, fingerprint, versions, git revision
manifest/     the input, normalised to Parquet shards
work/         what is pending, and what sessions committed so far; not for readers
captions/     one part for each manifest shard, in manifest order
rejects/      likewise
summary.json  report.html  _SUCCESS
"""

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from sharegpt4v.engine.base import EngineStats
from sharegpt4v.errors import UserError

SCHEMA_VERSION = 1
"""Of the run folder; a folder written by another version is refused rather than misread."""

_PACKAGES = ("sharegpt4v-platform", "torch", "transformers", "ray", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. `path` is a local or shared folder; URIs are refused by `open_run`."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / "manifest"

    @property
    def captions(self) -> Path:
        return self.path / "captions"

    @property
    def rejects(self) -> Path:
        return self.path / "rejects"

    @property
    def pending(self) -> Path:
        return self.path / "work" / "pending"

    @property
    def outcomes(self) -> Path:
        return self.path / "work" / "outcomes"

    @property
    def sessions(self) -> Path:
        return self.path / "work" / "sessions"

    @property
    def success(self) -> Path:
        return self.path / "_SUCCESS"

    def shards(self) -> list[Path]:
        return sorted(self.manifest.glob("part-*.parquet"))


def open_run(path: Path) -> RunFolder:
    """Creates the folder where needed. Raises UserError when it cannot be written or is something else."""
    make_writable(path)
    names = {entry.name for entry in path.iterdir()}
    if names and not names & {"run.yaml", "lease.json"}:  # a run's first file is its lease
        raise UserError(
            f"--out {path} holds other files ({sorted(names)[0]}, ...): give an empty or new folder"
        )
    return RunFolder(path.absolute())


def make_writable(path: Path) -> None:
    """Creates the folder of an --out where needed. Raises UserError for a URI and for one not writable."""
    if "://" in str(path) or ":/" in str(path):
        raise UserError(f"--out {path} is a URI: it must be a local or shared folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        # access() tells root that everything is writable; only a real write tells.
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out {path}: {error.strerror}; choose another folder") from None


def check_fingerprint(run: RunFolder, fingerprint: dict[str, Any]) -> None:
    """Raises UserError naming the first field that would make a resume's rows differ from the earlier ones.

    fingerprint: what changes an output row, and only that. A new run folder has nothing to compare with.
    """
    if not (run.path / "run.yaml").exists():
        return
    old = read_settings(run.path)
    if old.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{run.path} was written with run folder version {old.get('schema_version')}, this is "
            f"version {SCHEMA_VERSION}: finish it with the release that began it, or give another --out"
        )
    for key in sorted(fingerprint.keys() | old["fingerprint"].keys()):
        before, now = old["fingerprint"].get(key), fingerprint.get(key)
        if before != now:
            raise UserError(
                f"{key} changed since this run began ({_short(before)} before, {_short(now)} now): "
                f"restore it, or give another --out"
            )


def write_settings(
    run: RunFolder, config: dict[str, Any], fingerprint: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Writes run.yaml. facts: what readers of the run need (root, model, prompt_id, prompt_text, engine)."""
    settings = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "config": config,
        "fingerprint": fingerprint,
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }
    write_atomic(run.path / "run.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def read_settings(run: Path) -> dict[str, Any]:
    """`run.yaml` of a run folder. Raises UserError when `run` is no run folder."""
    try:
        settings = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{run} is no run folder (no run.yaml in it); `sharegpt4v caption` makes one"
        ) from None
    assert isinstance(settings, dict)
    return settings


def write_atomic(path: Path, text: str) -> None:
    """Whole or not at all: written beside its final name, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def begin_session(run: RunFolder) -> Path:
    """A folder for this session's outcomes, numbered after all earlier ones, and its start time."""
    run.sessions.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.stem) for p in run.sessions.glob("*.json")), default=-1)
    write_atomic(run.sessions / f"{number:04}.json", json.dumps({"started": datetime.now(UTC).timestamp()}))
    outcomes = run.outcomes / f"{number:04}"
    outcomes.mkdir(parents=True)
    return outcomes


def end_session(run: RunFolder, outcomes: Path, engines: EngineStats) -> None:
    """Adds what its engines did to the session of `outcomes`; one that was killed has no such entry."""
    path = run.sessions / f"{outcomes.name}.json"
    write_atomic(path, json.dumps(json.loads(path.read_text()) | {"engines": asdict(engines)}))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # a job's working directory need not be an installed package


def _git_revision() -> str | None:
    """The commit of the code that runs, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _short(value: Any) -> str:
    text = repr(value)  # on one line, whatever a prompt holds
    return text if len(text) <= 60 else text[:57] + "..."
