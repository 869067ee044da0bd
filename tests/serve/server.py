"""A real server in this process: uvicorn in a thread, on a port of its own."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from serve.api import Api
from serve.dialogues import ModelInfo
from serve.model import ServedModel
from sharegpt4v.dialogue import SquareImages
from sharegpt4v.engine.fake import FakeEngine, FakeOptions


@contextmanager
def serving(api: Api) -> Iterator[str]:
    """The address of a running API."""
    server = uvicorn.Server(uvicorn.Config(api.app(), port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def fake_models(seconds: float = 0.0, slots: int = 64, **faults: str) -> Iterator[dict[str, ServedModel]]:
    """A fake chat model and a fake captioner on one engine. faults: see FakeOptions, over request ids."""
    options = FakeOptions(seconds_per_request=seconds, requests_at_once=slots, faults=faults)
    engine = FakeEngine(options)
    pad, squash = SquareImages(96, "pad"), SquareImages(96, "squash")
    try:
        yield {
            "fake-chat": ServedModel(engine, ModelInfo("fake-chat", "chat", pad)),
            "fake-captioner": ServedModel(engine, ModelInfo("fake-captioner", "captioner", squash)),
        }
    finally:
        engine.close()


def png(seed: int = 0, width: int = 40, height: int = 30) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(text: str, *urls: str) -> Any:
    """A user's message with images before its text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}
