"""A run in the formats that others read: LLaVA's JSON, chat messages, a Hugging Face data set, tar shards.

Every format is streamed, so memory does not grow with the run, and appears under its name only when
whole: it is written beside its place and renamed.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sharegpt4v.atomic import atomic_path
from sharegpt4v.captions.export import hf, llava, messages, webdataset
from sharegpt4v.captions.export.caption_set import CaptionSet, Progress, open_captions
from sharegpt4v.captions.export.root import unusable_images
from sharegpt4v.config.export import ExportFormat
from sharegpt4v.errors import UserError

Writer = Callable[[CaptionSet, Path], None]
"""Writes the captions to a path that does not exist yet."""


@dataclass(frozen=True)
class FormatSpec:
    """One format: its writer, the end of its default name, and what it does with images.

    images: `named` by the manifest's path, `located` by an absolute one, `optional` for bytes on request,
    `held` for bytes always. hint: how others read it, with {out} and {name} to fill in.
    """

    write: Writer
    suffix: str
    images: Literal["named", "located", "optional", "held"]
    hint: str = ""


FORMATS: Mapping[ExportFormat, FormatSpec] = {
    "llava-json": FormatSpec(llava.write, ".json", "named"),
    "messages": FormatSpec(messages.write, "-messages", "located", messages.HINT),
    "hf": FormatSpec(hf.write, "-hf", "optional"),
    "webdataset": FormatSpec(webdataset.write, "-wds", "held"),
}


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote.

    captions: those that are in the files. left_out: ids of those that the format cannot hold. rows: images of
    the run; rejects: those without a caption for a reason; undone: those of an unfinished run without either.
    notes: what the user should know, one line each. hint: how others read it, or "".
    """

    out: Path
    captions: int
    left_out: list[str]
    rows: int
    rejects: int
    undone: int
    partial: bool
    files: int
    size: int  # bytes of all files
    notes: list[str]
    hint: str


def export_run(
    run: Path,
    target: ExportFormat,
    out: Path,
    *,
    root: str | None = None,
    with_images: bool = False,
    partial: bool = False,
    progress: Progress = lambda done, rows: None,
) -> ExportSummary:
    """Writes the captions of a run to `out`: one file for llava-json, a folder for the others.

    root: where the manifest's image paths begin now; None where the run read them. with_images: hold the
    images' bytes, where the format may do so or not. partial: take an unfinished run as it is.
    Raises UserError for an unfinished run without `partial`, a run without captions, an `out` that exists or
    cannot be written, a wrong root, and images that are gone or are no longer the captioned ones.
    """
    spec = FORMATS[target]
    if with_images and spec.images in ("named", "located"):
        raise UserError(
            f"{target} only names images: leave it out, or choose hf or webdataset", field="with_images"
        )
    _refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            captions = open_captions(run, Path(scratch), partial=partial, progress=progress)
            captions.root = root if root is not None else captions.root
            captions.with_images = with_images or spec.images == "held"
            notes = _check_root(captions, spec, given=root is not None)
            with atomic_path(out) as temporary:
                spec.write(captions, temporary)
                if not captions.partial and not (run / "_SUCCESS").exists():
                    raise UserError(f"{run} was resumed meanwhile: wait for its end, then export again")
                _refuse_existing(out)
    except OSError as error:
        raise UserError(f"cannot export {run} to {out}: {error}; mend that, then export again") from error
    return _summary(captions, out, notes, spec.hint)


def _check_root(captions: CaptionSet, spec: FormatSpec, *, given: bool) -> list[str]:
    """Looks at a few images where the export depends on the root; returns notes for the user."""
    if not (given or captions.with_images or spec.images == "located"):
        return []
    problem = unusable_images(captions, same_bytes=captions.with_images)
    if problem is None:
        return []
    if given or captions.with_images:
        raise UserError(f"{problem}: give the `root` where the run's image paths begin now, or restore them")
    return [f"{problem}; the paths are written all the same: `root` gives them another beginning"]


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: give another path, or remove it", field="out")


def _summary(captions: CaptionSet, out: Path, notes: list[str], hint: str) -> ExportSummary:
    rows, rejects = captions.summary["rows"], captions.summary["rejects"]
    files = [path for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file()]
    return ExportSummary(
        out=out,
        captions=captions.rows - len(captions.left_out),
        left_out=captions.left_out,
        rows=rows,
        rejects=rejects,
        undone=rows - captions.rows - rejects,
        partial=captions.partial,
        files=len(files),
        size=sum(path.stat().st_size for path in files),
        notes=notes,
        hint=hint.format(out=out, name=messages.dataset_name(captions.name)),
    )
