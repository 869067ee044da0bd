"""The data contracts between stages, as Arrow schemas.

Every file the platform writes between stages has one of these schemas, column for column, so that
any Parquet reader (pandas, DuckDB, Spark, Ray Data) can read the results.
"""

from collections.abc import Mapping

import pyarrow as pa

LOCATION_COLUMNS = ("image", "container", "offset", "size")
"""Columns of MANIFEST and PENDING that say where an image's bytes are, in ImageReader.read's order."""

IDENTITY_COLUMNS = ("shard", "row", "id", "image", "source")
"""Columns of PENDING that every step of captioning passes on unchanged."""

TURN = pa.struct([pa.field("from", pa.string()), pa.field("value", pa.string())])
"""One turn of a conversation, as the released files spell it: from is human or gpt."""

MANIFEST = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("container", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("conversations", pa.list_(TURN)),
    ]
)

CAPTIONS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("image", pa.string()),
        pa.field("source", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("prompt_id", pa.string()),
        pa.field("model", pa.string()),
        pa.field("tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("attempt", pa.int32()),
        pa.field("image_sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("image", pa.string()),
        pa.field("source", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("attempt", pa.int32()),
    ]
)

OUTCOME = "outcome"
"""Column that divides what is committed together into its two kinds: `caption` or `reject`."""

PENDING = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("row", pa.int32()),
        *[MANIFEST.field(name) for name in ("id", "image", "source", "container", "offset", "size")],
    ]
)
"""What a session still has to do. (shard, row) follows each image to its outcome, so that the audit
is a bit per manifest row and the finished output is in manifest order."""

OUTCOMES = pa.schema(
    [
        pa.field(OUTCOME, pa.string()),
        PENDING.field("shard"),
        PENDING.field("row"),
        *CAPTIONS,
        *[REJECTS.field(name) for name in ("stage", "reason", "message")],
    ]
)
"""One row an image, whatever became of it. Fields that only the other kind has are null."""

COLUMNS: Mapping[str, str] = {
    "id": "names the image; unique in the manifest",
    "image": "path below the root, or a URI that fsspec reads",
    "source": "data set the image comes from: coco, lcs, sam, textcaps, ... or any name",
    "container": 'tar shard that holds the bytes, or "" for a file of its own',
    "offset": "first byte inside the container, or 0",
    "size": "bytes inside the container, or -1 for a file of its own",
    "conversations": "turns that the input brought along, spelt as in the released files; null without any",
    "caption": "what the model wrote; in rejects what the gate refused last, null for other stages",
    "prompt_id": "name@version of the prompt",
    "model": "name@digest of the weights that wrote the caption",
    "tokens": "generated tokens, end token included",
    "finish_reason": "stop: the model ended the caption; length: it was cut at the length cap",
    "attempt": "0 the first, 1 the retry with other sampling after the gate refused",
    "image_sha256": "hex digest of the image file's bytes",
    "width": "pixels of the original, after its EXIF rotation",
    "height": "likewise",
    "stage": "what refused the image: decode, caption (the engine), gate; check in the output of `check`",
    "reason": "stable code that summaries count by, such as missing, truncated or too_short",
    "message": "what happened, in one line for people",
    "shard": "number of the manifest shard: manifest/part-<shard>.parquet",
    "row": "position inside that shard",
    OUTCOME: "what became of the image: caption or reject",
}
"""What each column of these schemas holds; the documentation is made from it."""
