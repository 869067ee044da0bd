"""A folder that `datasets.load_dataset(folder)` reads and the Hugging Face hub shows: Parquet and a card."""

import json
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sharegpt4v import records
from sharegpt4v.captions import parts
from sharegpt4v.captions.toy_warning import toy_warning
from sharegpt4v.run.settings import read_settings

ROWS_PER_FILE = 250_000
"""About 100 MB a file at the paper's caption length; the hub asks for files well below 5 GB."""

_SIZE_NAMES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")


def write(run: Path, out: Path, root: str | None) -> None:
    """Write data/train-*.parquet with the columns of `records.CAPTIONS`, and README.md, below `out`.

    Images are named, not included: `root` is not needed.
    """
    (out / "data").mkdir(parents=True)
    files = -(-parts.count(run, "captions") // ROWS_PER_FILE)
    for number, pieces in groupby(_pieces(run), key=itemgetter(0)):
        path = out / "data" / f"train-{number:05}-of-{files:05}.parquet"
        with pq.ParquetWriter(path, records.CAPTIONS, compression="zstd") as writer:
            for _, batch in pieces:
                writer.write_batch(batch)
    (out / "README.md").write_text(card(run), encoding="utf-8")


def _pieces(run: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The captions in order, cut where files end, each piece with the number of its file."""
    row = 0
    for batch in parts.batches(run, "captions"):
        while len(batch):
            piece = batch.slice(0, ROWS_PER_FILE - row % ROWS_PER_FILE)
            yield row // ROWS_PER_FILE, piece
            row += len(piece)
            batch = batch.slice(len(piece))


def card(run: Path) -> str:
    """The data set card: YAML front matter for the hub, then what a reader must know of the captions.

    The licence is left to the publisher, because it follows from the images and from the model.
    """
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    warning = toy_warning(summary["model"])
    front = {
        "pretty_name": f"Captions of {run.resolve().name}",
        "language": ["en"],
        "task_categories": ["image-to-text"],
        "size_categories": [size_category(summary["captions"])],
        "tags": ["image-captioning", "synthetic"] + (["stand-in"] if warning else []),
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sharegpt4v.captions.export", "."),
        autoescape=True,  # the hub renders HTML inside Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: " ".join(text.split()).replace("|", "\\|")
    return environment.get_template("dataset_card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        name=" ".join(run.resolve().name.split()),
        summary=summary,
        warning=warning,
        sources=sorted(summary["by_source"].items(), key=lambda item: -item[1]["captions"]),
        prompt=read_settings(run)["prompt_text"].splitlines(),
    )


def size_category(rows: int) -> str:
    """The hub's name for a number of rows: `n<1K`, `1K<n<10K`, and so on by powers of ten."""
    for power, name in enumerate(_SIZE_NAMES):
        if rows < 1_000 * 10**power:
            return f"{_SIZE_NAMES[power - 1]}<n<{name}" if power else f"n<{name}"
    return f"{_SIZE_NAMES[-1]}<n<100B"
