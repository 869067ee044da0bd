"""run.yaml: the resolved configuration of a run, and the fingerprint that guards a resume."""

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from sharegpt4v.atomic import write_atomic
from sharegpt4v.credentials import all_without_credentials
from sharegpt4v.errors import UserError
from sharegpt4v.run.folder import RunFolder

SCHEMA_VERSION = 1
"""Of the run folder; a folder written by another version is refused rather than misread."""

_MEND = "restore that file, or give another folder"

_PACKAGES = ("sharegpt4v-platform", "torch", "transformers", "ray", "pyarrow", "pillow", "numpy")


def check_version(run: RunFolder) -> None:
    """Raises UserError for a run folder of another version; a new one has none yet."""
    if not run.settings.exists():
        return
    version = read_settings(run.path).get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{run.path} was written with run folder version {version}, this is version {SCHEMA_VERSION}: "
            f"finish it with the release that began it, or give another folder",
            field="out",
        )


def check_fingerprint(run: RunFolder, fingerprint: dict[str, Any]) -> None:
    """Raises UserError naming the first field that would make a resume's rows differ from the earlier ones.

    fingerprint: what changes an output row, and only that. A new run folder has nothing to compare with.
    """
    check_version(run)
    if not run.settings.exists():
        return
    old, fingerprint = read_settings(run.path), all_without_credentials(fingerprint)
    for key in sorted(fingerprint.keys() | old["fingerprint"].keys()):
        before, now = old["fingerprint"].get(key), fingerprint.get(key)
        if before != now:
            raise UserError(
                f"changed since this run began ({_short(before)} before, {_short(now)} now): "
                f"restore it, or give another `out`",
                field=key,
            )


def write_settings(
    run: RunFolder, config: dict[str, Any], fingerprint: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Writes run.yaml. facts: what readers of the run need (root, model, prompt_id, prompt_text, engine).

    Credentials in URIs are left out: a run folder is handed on, and a resume gets them with its command.
    """
    settings = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "config": config,
        "fingerprint": fingerprint,
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }
    write_atomic(
        run.settings, yaml.safe_dump(all_without_credentials(settings), sort_keys=False, allow_unicode=True)
    )


def read_settings(run: Path) -> dict[str, Any]:
    """Reads `run.yaml` of a run folder. Raises UserError for another folder and for a damaged file."""
    path = run / "run.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{run} is no run folder (no run.yaml in it); `sharegpt4v caption` makes one"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no valid YAML ({' '.join(str(error).split())[:200]}): {_MEND}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings: {_MEND}")
    # One of another version may hold other fields; check_version() says so.
    for field in ("config", "fingerprint") if settings.get("schema_version") == SCHEMA_VERSION else ():
        if not isinstance(settings.get(field), dict):
            raise UserError(f"{path} has no `{field}`: {_MEND}")
    return settings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # a job's working directory need not be an installed package


def _git_revision() -> str | None:
    """Returns the commit of the code that runs, or None outside a checkout."""
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
