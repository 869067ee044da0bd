"""Any heap of images, read as one manifest: who the images are, where their bytes lie."""

from sharegpt4v.manifest.ids import IdSet
from sharegpt4v.manifest.normalise import Manifest, normalise
from sharegpt4v.manifest.read import ManifestRow, read_rows

__all__ = ["IdSet", "Manifest", "ManifestRow", "normalise", "read_rows"]
