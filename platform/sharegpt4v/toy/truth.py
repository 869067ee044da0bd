"""The file that makes a folder of images the toy world's: the truth of every scene, beside the images."""

import json
from pathlib import Path

TRUTH_FILE = "truth.jsonl"


def is_toy_world(root: str) -> bool:
    """Returns whether images below `root`, a local folder, are rendered scenes, listed in its TRUTH_FILE."""
    try:
        with open(Path(root) / TRUTH_FILE, encoding="utf-8") as file:
            record = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"caption", "scene"} <= record.keys()
