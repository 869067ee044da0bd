"""LLaVA's conversation file: one JSON array of {id, image, source, conversations}.

The released caption files have this shape. `source` is ours: LLaVA's readers pass over it, and with it the
file is a manifest that loses nothing.
"""

import json
from pathlib import Path

from sharegpt4v.captions.export.caption_set import CaptionSet

IMAGE = "<image>"
"""Where LLaVA puts the image into the human turn."""


def write(captions: CaptionSet, out: Path) -> None:
    """Streams the captions to the JSON file `out`, one record a line; images are named as in the manifest.

    Raises UserError for images in tar shards: the names of their members would lead every reader astray.
    """
    captions.refuse_shards("llava-json")
    question = f"{IMAGE}\n{captions.prompt}"
    separator = "[\n"
    with open(out, "w", encoding="utf-8") as file:
        for batch in captions.batches(["id", "image", "source", "caption"]):
            for row in batch.to_pylist():
                caption = row.pop("caption")
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
                file.write(separator + json.dumps(row | {"conversations": turns}, ensure_ascii=False))
                separator = ",\n"
            captions.advance(len(batch))
        file.write("\n]\n")
