"""LLaVA's conversation file: one JSON array of {id, image, source, conversations}.

The released caption files have this shape. `source` is ours: LLaVA's readers pass over it, and with it the
file is a manifest that loses nothing.
"""

import json
from pathlib import Path

from sharegpt4v.captions import parts
from sharegpt4v.run.settings import read_settings

IMAGE = "<image>"
"""Where LLaVA puts the image into the human turn."""


def write(run: Path, out: Path, root: str | None) -> None:
    """Stream the captions of `run` to the JSON file `out`, one record a line; `root` is not needed."""
    question = f"{IMAGE}\n{read_settings(run)['prompt_text']}"
    separator = "[\n"
    with open(out, "w", encoding="utf-8") as file:
        for batch in parts.batches(run, "captions", ["id", "image", "source", "caption"]):
            for row in batch.to_pylist():
                caption = row.pop("caption")
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
                file.write(separator + json.dumps(row | {"conversations": turns}, ensure_ascii=False))
                separator = ",\n"
        file.write("\n]\n")
