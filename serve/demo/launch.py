"""Checks a configuration and serves the page, with Gradio's own doors shut."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from serve.demo.toys import ToyApi, toy_api
from serve.keys import is_loopback, name_of, read_keys
from serve.one_process import listen, url_of
from sharegpt4v.config.demo import SERVED_HERE, DemoConfig
from sharegpt4v.errors import UserError
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.images import iter_write_images
from sharegpt4v.toy.questions import questions

_EXAMPLES = ("caption", "existence", "words", "count")
"""Kinds of the examples' questions, in the order of the toy world's sources: signs come third."""

_SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")


def launch(config: DemoConfig) -> int:
    """Serves the page until Ctrl-C or SIGTERM.

    Raises UserError for an open door without a login, a port in use, or settings that contradict each other.
    """
    if config.toys and (config.api or config.api_key_file):
        raise UserError("the toy models' own server is asked: leave out `api` and its key", field="toys")
    if not config.login and not is_loopback(config.host):
        raise UserError(
            f"{config.host} can be reached from elsewhere: give `login`, or 127.0.0.1", field="host"
        )
    users = _users(config.login) if config.login else {}
    key = _key(config.api_key_file) if config.api_key_file else None
    listen(config.host, config.port).close()
    with _ended_by_sigterm(), toy_api() if config.toys else nullcontext() as toys:
        _serve_page(config, toys, key, users)
    return 0


def _serve_page(config: DemoConfig, toys: ToyApi | None, key: str | None, users: dict[str, str]) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    import gradio as gr

    from serve.demo.client import ApiClient
    from serve.demo.page import CSS, build_page

    with tempfile.TemporaryDirectory(prefix="examples-") as folder:
        examples = list(_examples(Path(folder)))
        url = toys.url() if toys else config.api or SERVED_HERE
        page = build_page(ApiClient(url, key), examples, config.feedback)
        page.queue(max_size=64, default_concurrency_limit=16)

        def may_enter(name: str, password: str) -> bool:
            return name_of(f"Bearer {password}", users) == name

        page.launch(
            server_name=config.host,
            server_port=config.port,
            auth=may_enter if users else None,
            theme=gr.themes.Default(font=_SYSTEM_FONTS, font_mono=("ui-monospace", "monospace")),
            css=CSS,
            share=False,
            ssr_mode=False,
            footer_links=[],
            enable_monitoring=False,
            allowed_paths=[folder],
            max_file_size=config.upload_megabytes * 1_000_000,
            prevent_thread_lock=True,
            quiet=True,
        )
        print(f"ready: {url_of(config.host, config.port)} (API: {url})", flush=True)
        page.block_thread()


def _examples(folder: Path) -> Iterator[tuple[str, Path]]:
    """Writes toy scenes and yields a question about each, or the captioner's prompt."""
    for scene, kind in zip(iter_write_images(folder, len(_EXAMPLES)), _EXAMPLES, strict=True):
        asked = {question.kind: question.text for question in questions(scene)}
        yield asked.get(kind, UNIFIED_CAPTION.text), folder / scene.path


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Has SIGTERM end the process as an exception does: the default leaves what was started running."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _users(path: Path) -> dict[str, str]:
    try:
        return read_keys(path)
    except UserError as error:
        raise UserError(error.text, field="login") from None


def _key(path: Path) -> str:
    """Reads the API's key. Raises UserError for a file that cannot be read or is empty."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"cannot read {path}: {why}", field="api_key_file") from None
    if not key or len(key.split()) > 1:
        raise UserError(f"{path} must hold the key and nothing else", field="api_key_file")
    return key
