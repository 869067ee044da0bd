"""Rows as the steps get them, for images that lie in a folder."""

import pyarrow as pa

from sharegpt4v.records import PENDING


def pending_rows(*names: str) -> pa.Table:
    """One row of records.PENDING an image, its id `id of NAME`."""
    count = len(names)
    columns = {
        "shard": [3] * count,
        "row": list(range(10, 10 + count)),
        "id": [f"id of {name}" for name in names],
        "image": list(names),
        "source": ["coco"] * count,
        "container": [""] * count,
        "offset": [0] * count,
        "size": [-1] * count,
    }
    return pa.table(columns, schema=PENDING)
