"""Which data set an image comes from, told by the first folder of its path (reference.md 6)."""

import pyarrow as pa
import pyarrow.compute as pc

UNKNOWN = "unknown"

SOURCE_OF_FOLDER = {
    "coco": "coco",
    "sam": "sam",
    "llava": "lcs",  # llava_pretrain: the 558K images of LAION, CC and SBU
    "share_textvqa": "textcaps",
    "textvqa": "textcaps",
    "web-landmark": "landmark",
    "web-celebrity": "celebrity",
    "wikiart": "wikiart",
    "gqa": "gqa",
    "ocr_vqa": "ocr_vqa",
    "vg": "vg",
}


def source_of(image: pa.Array) -> pa.Array:
    """Source names for a column of image paths: `coco` for coco/train2017/1.jpg, `unknown` elsewhere."""
    conditions = [pc.starts_with(image, pattern=f"{folder}/") for folder in SOURCE_OF_FOLDER]
    struct = pc.make_struct(*conditions, field_names=list(SOURCE_OF_FOLDER))
    return pc.case_when(struct, *SOURCE_OF_FOLDER.values(), UNKNOWN)
