"""Names the data set that an image comes from by the first folder of its path."""

import pyarrow as pa
import pyarrow.compute as pc

UNKNOWN = "unknown"

# Image roots of the released files (reference.md, 6).
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
    """Returns the source of each image path: `coco` for coco/train2017/1.jpg, `lcs` for llava/a.jpg.

    Other paths give their first folder, `cats` for cats/1.jpg; `unknown` where there is none or it is just a
    number, and for URIs.
    """
    first = pc.struct_field(pc.extract_regex(image, r"^(?P<folder>[^/.:][^/:]*)/"), "folder")
    named = pc.and_kleene(pc.is_valid(first), pc.invert(pc.match_substring_regex(first, r"^\d+$")))
    others = pc.if_else(pc.fill_null(named, False), first, UNKNOWN)
    conditions = [pc.starts_with(image, pattern=f"{folder}/") for folder in SOURCE_OF_FOLDER]
    struct = pc.make_struct(*conditions, field_names=list(SOURCE_OF_FOLDER))
    return pc.case_when(struct, *SOURCE_OF_FOLDER.values(), others)
