"""The file that makes a folder of images the toy world's: the truth of every scene, beside the images."""

import json
from pathlib import Path

TRUTH_FILE = "truth.jsonl"


def is_toy_world(root: str) -> bool:
    """Whether images below `root`, a local folder, are rendered scenes: its TRUTH_FILE describes them."""
    try:
        with open(Path(root) / TRUTH_FILE, encoding="utf-8") as file:
            record = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"caption", "scene"} <= record.keys()
