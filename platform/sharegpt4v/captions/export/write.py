"""A finished run in the formats that others read: LLaVA's JSON, a Hugging Face data set, WebDataset shards.

Every format is streamed, so memory does not grow with the run, and appears under its name only when
whole: it is written beside its place and renamed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sharegpt4v.atomic import atomic_path
from sharegpt4v.captions import parts
from sharegpt4v.captions.export import hf, llava, webdataset
from sharegpt4v.errors import UserError

Format = Literal["llava-json", "hf", "webdataset"]

Writer = Callable[[Path, Path, str | None], None]
"""Writes the run (first) to a path that does not exist yet (second); third is the images' root."""

WRITERS: Mapping[Format, Writer] = {
    "llava-json": llava.write,
    "hf": hf.write,
    "webdataset": webdataset.write,
}


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote."""

    target: Format
    out: Path
    captions: int
    files: int
    size: int  # bytes of all files


def export_run(run: Path, target: Format, out: Path, *, root: str | None) -> ExportSummary:
    """Write the captions of a finished run to `out`: one file for llava-json, a folder for the others.

    root: where the manifest's image paths begin; only webdataset reads images.
    Raises UserError for an unfinished run, a run without captions, an `out` that exists or cannot be
    written, and images that are gone or are no longer the captioned ones.
    """
    if not (run / "_SUCCESS").exists():
        raise UserError(f"{run} is not finished (it has no _SUCCESS): run its `sharegpt4v caption` again")
    captions = parts.count(run, "captions")
    if not captions:
        raise UserError(f"{run} holds no captions, so there is nothing to export; its report.html says why")
    _refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as partial:
            WRITERS[target](run, partial, root)
            _refuse_existing(out)
    except OSError as error:
        raise UserError(f"cannot export {run} to {out}: {error}; mend that, then export again") from error
    files = [path for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file()]
    return ExportSummary(target, out, captions, len(files), sum(path.stat().st_size for path in files))


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: choose another --out, or remove it")
