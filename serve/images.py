"""Images of requests: data URLs and files, decoded to the engine's shape within the server's limits."""

import base64
import binascii
import re

from serve.errors import ApiError, as_api_error, refused
from serve.limits import Limits
from sharegpt4v.dialogue import Image, ImageShape
from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageLimits, prepare_shape

_DATA_URL = re.compile(
    r"data:(?P<type>[\w.+-]{1,40}/[\w.+-]{1,80})?(?P<options>(?:;[\w.=+-]{1,80}){0,4}),", re.ASCII
)


def data_of(url: str, where: str) -> bytes:
    """Returns the bytes of a data URL. where: the field it is in. Raises ApiError for every other URL.

    Nothing is ever fetched: a server that follows a client's URLs reaches what the client must not.
    """
    head = url[:400].lower()
    if not head.startswith("data:"):
        raise refused(
            "only data URLs are accepted: data:image/png;base64,...", where, "unsupported_image_url"
        )
    found = _DATA_URL.match(head)
    if not found or ";base64" not in found["options"]:
        raise refused("this is no data URL in base64: data:image/png;base64,...", where, "invalid_image_url")
    if not (found["type"] or "").startswith("image/"):
        raise refused("the type of this data URL is no image's", where, "invalid_image_url")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise refused("the base64 of this data URL is damaged", where, "invalid_image_url") from None


def pixels(data: bytes, shape: ImageShape, limits: Limits, where: str) -> Image:
    """Brings an image's bytes to the shape of the model's engine. Raises ApiError for unusable ones."""
    most = ImageLimits(max_pixels=limits.pixels)
    try:
        return prepare_shape(data, shape, limits=most).pixels
    except Rejected as rejected:
        error = as_api_error(rejected, "")
        raise ApiError(error.status, error.message, code=error.code, param=where) from None
