"""A folder that `datasets.load_dataset(folder)` reads and the Hugging Face hub shows: Parquet and a card."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.dataset as pads
import yaml

from sharegpt4v import records
from sharegpt4v.run import parts
from sharegpt4v.run.folder import read_settings

ROWS_PER_FILE = 250_000
"""About 100 MB a file at the paper's caption length; the hub asks for files well below 5 GB."""

_SIZE_NAMES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")


def write(run: Path, out: Path, root: str | None) -> None:
    """Write data/train-*.parquet with the columns of `records.CAPTIONS`, and README.md, below `out`.

    Images are named, not included: `root` is not needed.
    """
    data = out / "data"
    data.mkdir(parents=True)
    pads.write_dataset(
        pa.RecordBatchReader.from_batches(records.CAPTIONS, parts.batches(run, "captions")),
        data,
        format="parquet",
        file_options=pads.ParquetFileFormat().make_write_options(compression="zstd"),
        basename_template="{i}.parquet",
        max_rows_per_file=ROWS_PER_FILE,
        max_rows_per_group=min(parts.BATCH_ROWS, ROWS_PER_FILE),
        use_threads=False,  # threads would mix the manifest's order
    )
    written = list(data.iterdir())
    for path in written:
        path.rename(data / f"train-{int(path.stem):05}-of-{len(written):05}.parquet")
    (out / "README.md").write_text(card(run), encoding="utf-8")


def card(run: Path) -> str:
    """The data set card: YAML front matter for the hub, then what a reader must know of the captions.

    The licence is left to the publisher, because it follows from the images and from the model.
    """
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    toy = summary["model"].startswith("toy")
    front = {
        "pretty_name": f"Captions of {run.resolve().name}",
        "language": ["en"],
        "task_categories": ["image-to-text"],
        "size_categories": [size_category(summary["captions"])],
        "tags": ["image-captioning", "synthetic"] + ["toy-stand-in"] * toy,
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sharegpt4v.run.export", "."),
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
        toy=toy,
        sources=sorted(summary["by_source"].items(), key=lambda item: -item[1]["captions"]),
        prompt=read_settings(run)["prompt_text"].splitlines(),
    )


def size_category(rows: int) -> str:
    """The hub's name for a number of rows: `n<1K`, `1K<n<10K`, ..., `n>1T` is out of reach here."""
    for power, name in enumerate(_SIZE_NAMES):
        if rows < 1_000 * 10**power:
            return f"{_SIZE_NAMES[power - 1]}<n<{name}" if power else f"n<{name}"
    return f"{_SIZE_NAMES[-1]}<n<100B"
