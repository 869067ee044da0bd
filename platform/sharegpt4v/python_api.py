"""Runs both models in a notebook: `Captioner.load("toy").caption(image)`, `Chat.load(FOLDER).ask(question)`.

`from sharegpt4v import Captioner, Chat` loads neither torch nor a weight; `load` does.
"""

import io
import itertools
import logging
import os
import weakref
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, overload

from PIL import Image as PillowImage

from sharegpt4v.checkpoints.card import TOY_CAPTIONER, TOY_CHAT, ModelCard, read_card
from sharegpt4v.dialogue import Image, SamplingParams, SquareImages, Turn
from sharegpt4v.dialogue import Request as EngineRequest
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.engine.dtype import Dtype, resolve_dtype
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.memory import use_huge_pages
from sharegpt4v.engine.openmp import limit_spinning
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.images import ImageReader, prepare, prepare_image
from sharegpt4v.prompts import UNIFIED_CAPTION

ImageLike: TypeAlias = PillowImage.Image | str | Path | bytes
"""A Pillow image, a path, a URI that fsspec reads, or the bytes of an image file."""

Device = Literal["auto", "cpu", "cuda"]

log = logging.getLogger(__name__)


class _Model:
    """A model in this process on the engine of captioning and serving. Close it, or use `with`."""

    _toy: Path  # the folder that "toy" names
    _prefixes = 0  # dialogues that the engine keeps for a next round

    def __init__(self, card: ModelCard, spec: EngineSpec) -> None:
        self.card = card
        self._engine = build_engine(spec)
        self._process = os.getpid()
        # At the latest when Python ends: a thread that is still inside torch then would abort the process.
        self._end = weakref.finalize(self, self._engine.close)
        self._numbers = itertools.count()

    @classmethod
    def load(
        cls,
        model: str | Path = "toy",
        *,
        device: Device = "auto",
        dtype: Literal["auto"] | Dtype = "auto",
        slots: int = 8,
        threads: int | None = None,
    ) -> Self:
        """Loads a transformers folder, a name of the Hugging Face Hub, a URI, or the shipped `toy`.

        slots: requests that run at once. threads: CPU threads, all cores by default. dtype auto:
        bfloat16 on a GPU and on a CPU with matrix units for it (AMX), otherwise, and for toy models on a
        CPU, float32. Raises UserError for a missing model or GPU.
        """
        card = read_card(str(model), toy=cls._toy)
        threads = threads or len(os.sched_getaffinity(0))
        limit_spinning(threads)
        use_huge_pages()
        import torch

        use_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
        if use_gpu and not torch.cuda.is_available():
            raise UserError("torch sees no GPU: give 'cpu' or 'auto'", field="device")
        return cls(
            card,
            EngineSpec(
                kind="torch",
                model=card.id,
                weights=str(card.folder),
                capacity=slots,
                dtype=resolve_dtype(dtype, card.weight_bytes, use_gpu),
                threads=threads,
                use_gpu=use_gpu,
                prefixes=cls._prefixes,
            ),
        )

    def close(self) -> None:
        """Ends the engine's thread and frees its memory."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pixels(self, image: ImageLike) -> Image:
        """Prepares an image as in training.

        Raises Rejected, StorageError when a store fails, or UserError for an object that is no image.
        """
        shape = self.card.images
        assert isinstance(shape, SquareImages), "the torch engine takes squares"
        size, protocol = shape.side, shape.protocol
        if isinstance(image, PillowImage.Image):
            return prepare_image(image, size, protocol).pixels
        if isinstance(image, str | Path):
            image = _read(str(image))
        if not isinstance(image, bytes):
            raise _no_image(image)
        return prepare(image, size, protocol).pixels

    def _submit(self, turns: Sequence[Turn], sampling: SamplingParams, stream: bool = False) -> Handle:
        if self._process != os.getpid():  # a fork has no thread of the engine: the request would never end
            raise UserError("the model was loaded before this process was forked: load it in this process")
        name = f"{type(self).__name__.lower()}-{next(self._numbers)}"
        return self._engine.submit(EngineRequest(name, tuple(turns), sampling, stream=stream))


def _no_image(given: object) -> UserError:
    """Makes the error for an object that is no ImageLike, an array or an open file for example."""
    kind = type(given).__name__
    hint = "PIL.Image.fromarray makes an image of an array, read() makes bytes of an open file"
    return UserError(f"an image is a Pillow image, a path or bytes, not {kind}; {hint}", field="images")


def _read(image: str) -> bytes:
    if "://" in image:
        return ImageReader(None).read(image)
    if "\0" in image:
        raise Rejected("missing", f"{image!r}: a path has no NUL character")
    path = Path(image).resolve()  # links may leave the folder: the caller chose the path
    return ImageReader(str(path.parent)).read(path.name)


class Captioner(_Model):
    """Describes images in detail, each with the captioner's own prompt unless another is given.

    For example::

        with Captioner.load("models/share-captioner") as captioner:
            print(captioner.caption("photo.jpg"))
    """

    _toy = TOY_CAPTIONER

    @overload
    def caption(self, images: ImageLike, *, prompt: str | None = None, **sampling: Any) -> str: ...

    @overload
    def caption(
        self, images: Iterable[ImageLike], *, prompt: str | None = None, **sampling: Any
    ) -> list[str | None]: ...

    def caption(
        self, images: ImageLike | Iterable[ImageLike], *, prompt: str | None = None, **sampling: Any
    ) -> str | list[str | None]:
        """Returns the caption of an image, or the captions of many in their order.

        Many are captioned together; an unreadable one yields None and a warning with its number. sampling:
        fields of dialogue.SamplingParams. Raises Rejected for a single image that cannot be read, EngineError
        when the model fails, UserError for a sampling value out of bounds or an object that is no image.
        """
        params = SamplingParams(**sampling)
        text = UNIFIED_CAPTION.text if prompt is None else prompt
        if isinstance(images, PillowImage.Image | str | Path | bytes):
            return self._submit([Turn("user", text, (self._pixels(images),))], params).result().text
        # The items of an array or of an open file would pass for images: its lines are bytes, too.
        if not isinstance(images, Iterable) or isinstance(images, bytearray | memoryview | io.IOBase):
            raise _no_image(images)
        handles: list[Handle | None] = []
        try:
            for number, image in enumerate(images):
                try:
                    handles.append(self._submit([Turn("user", text, (self._pixels(image),))], params))
                except Rejected as rejected:
                    log.warning("image %d has no caption: %s", number, rejected)
                    handles.append(None)
            return [handle.result().text if handle else None for handle in handles]
        finally:
            # After an error or Ctrl-C the next call would wait for all of these; no effect on finished ones.
            for handle in filter(None, handles):
                handle.cancel()


class Chat(_Model):
    """Holds a dialogue about images with ShareGPT4V or another LLaVA-shaped model.

    For example::

        chat = Chat.load("models/7b")
        print(chat.ask("What is in this photo?", "photo.jpg"))
        print(chat.ask("What colour is it?"))  # continues the dialogue
    """

    _toy = TOY_CHAT
    _prefixes = 1

    def __init__(self, card: ModelCard, spec: EngineSpec) -> None:
        super().__init__(card, spec)
        self.turns: list[Turn] = []

    def ask(self, question: str, *images: ImageLike, **sampling: Any) -> str:
        """Answers the next question of the dialogue. images: new images for this question.

        A question that fails leaves the dialogue as it was. Raises as `Captioner.caption` does.
        """
        return "".join(self.stream(question, *images, **sampling))

    def stream(self, question: str, *images: ImageLike, **sampling: Any) -> Generator[str, None, None]:
        """Yields the answer piece by piece; adds it to the dialogue after the last piece."""
        turn = Turn("user", question, tuple(self._pixels(image) for image in images))
        handle = self._submit([*self.turns, turn], SamplingParams(**sampling), stream=True)
        try:
            yield from handle
            answer = handle.result().text
        finally:
            handle.cancel()  # no effect on a finished request; frees the slot when the caller stops early
        self.turns += [turn, Turn("assistant", answer)]

    def reset(self) -> None:
        """Begins a new dialogue."""
        self.turns.clear()
