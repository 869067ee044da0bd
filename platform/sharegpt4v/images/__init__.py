"""Safe image decoding: bytes from anywhere in, uint8 pixels in the shape of an engine or a named reject out.

storage.py reads the bytes, formats.py judges them before any pixel is decoded, decode.py decodes,
protocols.py brings them to the model's square, or below a number of pixels.
"""

from sharegpt4v.images.formats import ImageLimits
from sharegpt4v.images.protocols import (
    PAD_COLOUR,
    Prepared,
    inspect,
    prepare,
    prepare_image,
    prepare_shape,
    prepare_whole,
)
from sharegpt4v.images.storage import ImageReader, StorageError

__all__ = [
    "PAD_COLOUR",
    "ImageLimits",
    "ImageReader",
    "Prepared",
    "StorageError",
    "inspect",
    "prepare",
    "prepare_image",
    "prepare_shape",
    "prepare_whole",
]
