"""README.md of an export: what the Hugging Face hub shows, and what a reader must know of the captions."""

from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from sharegpt4v.captions.export.caption_set import CaptionSet
from sharegpt4v.captions.toy_warning import toy_warning

COLUMNS: Mapping[str, str] = {
    "id": "unique name of the row",
    "image": "path of the image below its root, or its URI; the images themselves are not included",
    "source": "collection that the image comes from",
    "caption": "the text",
    "prompt_id": "name and version of the prompt",
    "model": "name and digest of the weights that wrote the caption",
    "tokens": "generated tokens, end token included",
    "finish_reason": "`stop`, or `length` for a caption cut at the limit",
    "attempt": "0 for a first caption, 1 for a retry with other sampling",
    "image_sha256": "digest of the image file's bytes",
    "width": "pixels, after the EXIF rotation",
    "height": "pixels, after the EXIF rotation",
}
"""Meaning of the columns of records.CAPTIONS, for people."""

_SIZE_NAMES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")


def card(captions: CaptionSet, *, data_files: str, columns: Mapping[str, str], usage: str) -> str:
    """Returns the data set card: YAML front matter for the hub, then where the captions come from.

    data_files: pattern of the data below the card. columns: what the fields mean. usage: Markdown on how
    to read the files. The licence is left to the publisher, because it follows from the images and the model.
    """
    warning = toy_warning(captions.summary["model"])
    front = {
        "pretty_name": f"Captions of {captions.name}",
        "language": ["en"],
        "task_categories": ["image-to-text"],
        "size_categories": [size_category(captions.rows)],
        "tags": ["image-captioning", "synthetic"] + (["stand-in"] if warning else []),
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": data_files}]},
        ],
    }
    return (
        _environment()
        .get_template("dataset_card.md.j2")
        .render(
            front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            name=" ".join(captions.name.split()),
            summary=captions.summary,
            warning=warning,
            partial=captions.partial,
            left_out=len(captions.left_out),
            sources=_most_first(captions.summary["by_source"]),
            prompt=captions.prompt.splitlines(),
            columns=columns,
            usage=usage,
        )
    )


def size_category(rows: int) -> str:
    """Returns the hub's name for a number of rows: `n<1K`, `1K<n<10K`, and so on by powers of ten."""
    for power, name in enumerate(_SIZE_NAMES):
        if rows < 1_000 * 10**power:
            return f"{_SIZE_NAMES[power - 1]}<n<{name}" if power else f"n<{name}"
    return f"{_SIZE_NAMES[-1]}<n<100B"


def _most_first(by_source: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(by_source.items(), key=lambda item: -item[1]["captions"])


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sharegpt4v.captions.export", "."),
        autoescape=True,  # the hub renders HTML inside Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: " ".join(text.split()).replace("|", "\\|")
    return environment
