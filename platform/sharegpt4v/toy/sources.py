"""The closed lists the toy world is made of, and its sources, named and filed as the paper's are.

A new word anywhere here enters the captions, and with them the toy tokenizer and the shipped checkpoints.
"""

from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (248, 222, 40),
    "green": (35, 150, 65),
    "blue": (35, 85, 220),
    "purple": (145, 55, 180),
}
"""Colours of objects, RGB; far enough apart to survive JPEG and a squash to 48 px."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")

SIZES = {"small": 0.54, "large": 0.88}
"""Side of an object's box over the shorter side of its grid cell."""

GRID = 3
"""Objects are placed in the cells of a 3 x 3 grid, at most one a cell; cell = 3 * row + column."""

PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the centre",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
"""How captions name each cell."""

RELATIONS = ("above", "left of", "right of")

ROWS = ("top", "middle", "bottom")

SIDES = ("left", "right")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (242, 242, 240),
    "grey": (150, 152, 155),
    "black": (28, 28, 30),
    "pink": (250, 190, 208),
}

SETTINGS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "beach": ((165, 215, 235), (228, 206, 160)),
    "glacier": ((188, 198, 215), (244, 248, 252)),
    "moor": ((26, 32, 62), (14, 16, 22)),
    "desert": ((238, 176, 160), (112, 88, 90)),
}
"""Sky and ground of the wide views."""

WORDS = (
    "OPEN",
    "STOP",
    "SALE",
    "EXIT",
    "CAFE",
    "BOOK",
    "MILK",
    "TAXI",
    "PARK",
    "SHOP",
    "FISH",
    "HOME",
    "RAIN",
    "LOVE",
    "JAZZ",
    "WEST",
)
"""What signs say: four capitals each, so that a letter stays about 10 px wide at 48 px."""

LANDMARKS = (
    "Meridian Tower",
    "Harrow Bridge",
    "Lantern Arch",
    "Ember Pyramid",
    "Solace Spires",
    "Vellan Dome",
)

STYLES = {
    "cubist": "A cubist painting",
    "pointillist": "A pointillist painting",
    "impressionist": "An impressionist painting",
    "woodcut": "A woodcut print",
}
"""Artistic styles, and how captions open on them."""

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven")

OBJECTS_BY_DIFFICULTY = {1: (1, 3), 2: (3, 5), 3: (5, 7)}
"""Fewest and most objects."""


@dataclass(frozen=True, slots=True)
class Source:
    """One image source.

    path: file below the image root, from the scene's index. sizes: (width, height) in pixels. backgrounds:
    names a scene draws from. margin: share of each side taken by a frame. scale: object sizes over those of
    SIZES. fewer: how many objects less than OBJECTS_BY_DIFFICULTY says, where something else fills the image.
    """

    path: str
    sizes: tuple[tuple[int, int], ...]
    backgrounds: tuple[str, ...]
    margin: float = 0.0
    scale: float = 1.0
    fewer: int = 0


SOURCES: dict[str, Source] = {
    "coco": Source(
        path="coco/train2017/{:012d}.jpg",
        sizes=((640, 480), (480, 640), (640, 427), (500, 375)),
        backgrounds=tuple(BACKGROUNDS),
    ),
    "sam": Source(
        path="sam/images/sa_{}.jpg",
        sizes=((1500, 1100), (1500, 1000), (1100, 1500)),
        backgrounds=tuple(SETTINGS),
        scale=0.93,
    ),
    "textcaps": Source(
        path="share_textvqa/images/{:08d}.jpg",
        sizes=((1024, 768), (768, 768), (800, 600)),
        backgrounds=("wall",),
    ),
    "landmark": Source(
        path="web-landmark/images/{:05d}.jpg",
        sizes=((800, 600), (600, 800), (900, 600)),
        backgrounds=("sky",),
        fewer=1,
    ),
    "wikiart": Source(
        path="wikiart/images/{:05d}.png",
        sizes=((600, 600), (720, 576), (576, 720)),
        backgrounds=tuple(STYLES),
        margin=0.0625,
    ),
}
