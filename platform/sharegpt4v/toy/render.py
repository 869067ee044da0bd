"""From the truth to pixels: the same picture at full size and, drawn directly, at a model's size."""

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from sharegpt4v.toy.backdrops import backdrop
from sharegpt4v.toy.scene import Box, Scene, SceneObject, WrittenWord
from sharegpt4v.toy.silhouettes import LANDMARK_OUTLINES, SHAPE_OUTLINES, Outline
from sharegpt4v.toy.sources import COLOURS, SOURCES

_FULL_FACTOR = 2
_SMALL_FACTOR = 4
"""Canvas pixels for each side of a pixel; anti-aliasing is their average."""

_SHADOW = (0, 0, 0, 70)
_STONE = (72, 66, 74)
_CLUTTER = (120, 120, 120)
_PLATE, _INK = (250, 250, 245), (15, 15, 20)
_GOLD, _GOLD_EDGE = (184, 146, 62), (96, 72, 28)
_PAINT = 0.12
"""Share of the canvas texture that shows through painted objects."""


def render(scene: Scene, size: tuple[int, int] | None = None) -> Image.Image:
    """The scene as an RGB image of its own size, or of `size` (width, height) without keeping the aspect.

    A small size is drawn at that size, hundreds of times faster, and looks like the full image squashed bicubically.
    """
    width, height = size or (scene.width, scene.height)
    factor = _SMALL_FACTOR if size else _FULL_FACTOR
    canvas = _Canvas(scene, (factor * width, factor * height))
    canvas.draw_scene()
    if size:
        return canvas.image.resize((width, height), Image.Resampling.BICUBIC)
    return canvas.image.reduce(factor)


class _Canvas:
    """Draws in the scene's pixels on an image of another size."""

    def __init__(self, scene: Scene, size: tuple[int, int]) -> None:
        self.scene = scene
        self.backdrop = backdrop(scene.background, scene.variant, size)
        self.image = self.backdrop.copy()
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.x_scale, self.y_scale = size[0] / scene.width, size[1] / scene.height

    def draw_scene(self) -> None:
        scene = self.scene
        for bar in scene.clutter:
            self.pen.rectangle(self._scaled(bar), fill=_CLUTTER)
        if scene.landmark:
            for part in LANDMARK_OUTLINES[scene.landmark.name]:
                self._polygon(part, scene.landmark.box, _STONE)
        for thing in scene.objects:
            self._object(thing)
        for word in scene.words:
            self._sign(word)
        if scene.style:
            self.image = Image.blend(self.image, self.backdrop, _PAINT)
            self._frame(SOURCES[scene.source].margin)

    def _object(self, thing: SceneObject) -> None:
        outline = SHAPE_OUTLINES[thing.shape]
        if not self.scene.style:
            shift = round(0.05 * (thing.box.x1 - thing.box.x0))
            self._polygon(outline, Box(*(edge + shift for edge in thing.box)), _SHADOW)
        self._polygon(outline, thing.box, COLOURS[thing.colour])

    def _sign(self, word: WrittenWord) -> None:
        x0, y0, x1, y1 = self._scaled(word.box)
        edge = 0.05 * (y1 - y0)
        self.pen.rectangle((x0, y0, x1, y1), fill=_PLATE, outline=_INK, width=max(1, round(edge)))
        left, top = round(x0 + 3 * edge), round(y0 + 3 * edge)
        letters = _letters(word.text).resize((round(x1 - 3 * edge) - left, round(y1 - 3 * edge) - top))
        self.image.paste(_INK, (left, top), letters)

    def _frame(self, margin: float) -> None:
        pen = ImageDraw.Draw(self.image)
        width, height = self.image.size
        across, down = round(margin * width), round(margin * height)
        for box in (
            (0, 0, width, down),
            (0, height - down, width, height),
            (0, 0, across, height),
            (width - across, 0, width, height),
        ):
            pen.rectangle(box, fill=_GOLD)
        line = max(1, round(0.1 * down))
        pen.rectangle((across, down, width - across, height - down), outline=_GOLD_EDGE, width=line)

    def _polygon(self, outline: Outline, box: Box, fill: tuple[int, ...]) -> None:
        x0, y0, x1, y1 = self._scaled(box)
        self.pen.polygon([(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in outline], fill=fill)

    def _scaled(self, box: Box) -> tuple[float, float, float, float]:
        return (
            box.x0 * self.x_scale,
            box.y0 * self.y_scale,
            box.x1 * self.x_scale,
            box.y1 * self.y_scale,
        )


@lru_cache(maxsize=32)
def _letters(text: str) -> Image.Image:
    """A mask of the word, cropped to its ink; large enough to be shrunk only on small images."""
    font = ImageFont.load_default(160)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text, stroke_width=6))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font, stroke_width=6)
    return mask
