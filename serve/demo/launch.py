"""Checks a configuration and serves the page, with Gradio's own doors shut."""

import os
import tempfile
from pathlib import Path

from serve.keys import is_loopback, name_of, read_keys
from sharegpt4v.config.demo import DemoConfig
from sharegpt4v.errors import UserError
from sharegpt4v.toy.images import write_images

_SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")


def launch(config: DemoConfig) -> int:
    """Serves the page until Ctrl-C. Raises UserError for an open door without a login."""
    if not config.login and not is_loopback(config.host):
        raise UserError(
            f"{config.host} can be reached from elsewhere: give `login`, or 127.0.0.1", field="host"
        )
    users = _users(config.login) if config.login else {}
    key = _key(config.api_key_file) if config.api_key_file else None
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    import gradio as gr

    from serve.demo.client import ApiClient
    from serve.demo.page import CSS, build_page

    with tempfile.TemporaryDirectory(prefix="examples-") as folder:
        write_images(Path(folder), 4)
        examples = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".jpg", ".png"))
        page = build_page(ApiClient(config.api, key), examples, config.feedback)
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
        print(f"ready: http://{config.host}:{config.port} (API: {config.api})", flush=True)
        page.block_thread()
    return 0


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
