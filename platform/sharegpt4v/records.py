"""The data contracts between stages, as Arrow schemas.

Every file the platform writes between stages has one of these schemas, column for column, so that
any Parquet reader (pandas, DuckDB, Spark, Ray Data) can take up the work where we left it.
"""

import pyarrow as pa

TURN = pa.struct([pa.field("from", pa.string()), pa.field("value", pa.string())])
"""One turn of a conversation, as the released files spell it: from is human or gpt."""

MANIFEST = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),  # path below the root, or a URI fsspec reads
        pa.field("source", pa.string(), nullable=False),  # coco, lcs, sam, textcaps, ... or any name
        pa.field("container", pa.string(), nullable=False),  # tar shard that holds the bytes, or ""
        pa.field("offset", pa.int64(), nullable=False),  # first byte inside the container, or 0
        pa.field("size", pa.int64(), nullable=False),  # bytes inside the container, or -1
        pa.field("conversations", pa.list_(TURN)),
    ]
)

CAPTIONS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("image", pa.string()),
        pa.field("source", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("prompt_id", pa.string()),  # name@version of the prompt, see prompts.py
        pa.field("model", pa.string()),  # name@digest of the weights that wrote the caption
        pa.field("tokens", pa.int32()),  # generated tokens, end token included
        pa.field("finish_reason", pa.string()),  # stop or length
        pa.field("attempt", pa.int32()),  # 0 first, 1 the retry with other sampling
        pa.field("image_sha256", pa.string()),  # hex digest of the file's bytes
        pa.field("width", pa.int32()),  # pixels, after the EXIF rotation
        pa.field("height", pa.int32()),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("image", pa.string()),
        pa.field("source", pa.string()),
        pa.field("stage", pa.string()),  # decode, caption, gate
        pa.field("reason", pa.string()),  # stable code that summaries count by
        pa.field("message", pa.string()),
        pa.field("caption", pa.string()),  # what the gate refused, of the last attempt; null for other stages
        pa.field("attempt", pa.int32()),
    ]
)

OUTCOME = "outcome"
"""Column that parts what is committed together into its two halves: `caption` or `reject`."""

PENDING = pa.schema(
    [
        pa.field("shard", pa.int32()),  # number of the manifest shard: manifest/part-<shard>.parquet
        pa.field("row", pa.int32()),  # position inside that shard
        *[MANIFEST.field(name) for name in ("id", "image", "source", "container", "offset", "size")],
    ]
)
"""What a session has still to do. (shard, row) follows each image to its outcome, so that the audit
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
"""One row an image, whatever became of it. Fields that only the other half has are null."""
