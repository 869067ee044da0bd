"""The page: a tab to chat about images and one to caption them. A model's words are shown as plain text."""

import html
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from serve.demo.chat import Chat
from serve.demo.client import ApiClient, Failed

IMAGE_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"]

CSS = """
.gradio-container { max-width: 900px !important; margin: auto; }
button[aria-label*="hare" i], button[title*="hare" i] { display: none !important; }
#chat img { max-height: 200px; object-fit: contain; }
#captions table { width: 100%; border-collapse: collapse; }
#captions th, #captions td { text-align: left; padding: 6px; vertical-align: top; overflow-wrap: anywhere; }
@media (max-width: 600px) { .gradio-container { padding: 4px !important; } button { min-height: 44px; } }
"""


Examples = Sequence[tuple[str, Path]]


def build_page(api: ApiClient, examples: Examples, feedback: Path) -> Any:
    """Makes the page. examples: questions with an image each; feedback: where thumbs are appended."""
    page: Any
    with gr.Blocks(title="ShareGPT4V", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# ShareGPT4V")
        with gr.Tab("Chat"):
            model = _chat_tab(api, examples, feedback)
        with gr.Tab("Captions"):
            captioner = _caption_tab(api)

        def find_models() -> tuple[Any, Any]:
            try:
                found = api.models()
            except Failed as error:
                gr.Warning(str(error))
                return gr.skip(), gr.skip()
            names = [name for name, _ in found]
            chats = [name for name, kind in found if kind == "chat"] or names
            captioners = [name for name, kind in found if kind == "captioner"] or names
            return gr.update(choices=names, value=chats[0]), gr.update(choices=names, value=captioners[0])

        page.load(find_models, outputs=[model, captioner])
    return page


def _chat_tab(api: ApiClient, examples: Examples, feedback: Path) -> gr.Dropdown:
    dialogue, box = _dialogue_box(), _question_box()
    with gr.Row():
        retry, clear = gr.Button("Retry", elem_id="retry"), gr.Button("Clear", elem_id="clear")
    if examples:
        rows = [{"text": text, "files": [str(path)]} for text, path in examples]
        gr.Examples(rows, box, label="Examples", examples_per_page=4)
    with gr.Accordion("Settings", open=False):
        model = gr.Dropdown([], label="Model", allow_custom_value=True)
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: the most likely words)")
        length = gr.Slider(1, 1024, 256, step=1, label="Longest answer, in tokens")
    chat = Chat(api, feedback)
    running = [
        begin.then(chat.reply, [dialogue, model, temperature, length], dialogue)
        for begin in (
            box.submit(chat.ask, [box, dialogue], [box, dialogue]),
            retry.click(chat.undo, dialogue, dialogue),
            dialogue.retry(chat.undo, dialogue, dialogue),
            dialogue.edit(chat.edit, dialogue, dialogue),
        )
    ]
    box.stop(None, cancels=running)
    clear.click(lambda: [], None, dialogue, cancels=running)
    dialogue.like(chat.like, dialogue, None)
    return model


def _dialogue_box() -> gr.Chatbot:
    return gr.Chatbot(
        label="Dialogue",
        height=420,
        editable="user",
        render_markdown=False,
        allow_tags=False,
        buttons=["copy"],
        elem_id="chat",
        placeholder="Upload or paste an image and ask about it.",
    )


def _question_box() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        label="Your question, with images",
        placeholder="Ask about an image",
        file_types=IMAGE_TYPES,
        file_count="multiple",
        sources=["upload"],
        stop_btn=True,
        max_plain_text_length=20_000,
        elem_id="question",
    )


def _caption_tab(api: ApiClient) -> gr.Dropdown:
    files = gr.File(label="Images", file_count="multiple", file_types=IMAGE_TYPES, elem_id="images")
    go = gr.Button("Caption", variant="primary", elem_id="caption")
    gallery = gr.Gallery(
        label="Images with their captions",
        columns=2,
        height="auto",
        object_fit="contain",
        buttons=["fullscreen"],
    )
    table = gr.HTML(elem_id="captions")
    download = gr.DownloadButton("Download as JSON", interactive=False, elem_id="download")
    model = gr.Dropdown([], label="Model", allow_custom_value=True)

    async def caption(paths: list[str] | None, name: str) -> tuple[Any, Any, Any]:
        if not paths:
            gr.Warning("Choose one image or several first.")
            return gr.skip(), gr.skip(), gr.skip()
        try:
            rows = await api.captions(name or None, paths)
        except Failed as error:
            gr.Warning(str(error))
            failed = {"filename": "", "error": {"message": str(error)}}
            return [], _table([failed]), gr.update(interactive=False)
        shown = [(path, _text(row)) for path, row in zip(paths, rows, strict=True) if row.get("caption")]
        return shown, _table(rows), gr.update(value=_saved(rows), interactive=True)

    go.click(caption, [files, model], [gallery, table, download])
    return model


def _text(row: dict[str, Any]) -> str:
    return row["caption"] if row.get("caption") else f"No caption: {row['error']['message']}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table of plain text: a data frame of Gradio's is wider than a phone."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("image", "caption", "gate", "tokens"))
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) for row in rows]
    return f"<table><tr>{heads}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cells(row: dict[str, Any]) -> list[str]:
    verdict = row.get("verdict") or {}
    gate = (
        ""
        if not verdict
        else "accepted"
        if verdict["accepted"]
        else f"{verdict['reason']}: {verdict['message']}"
    )
    return [row["filename"], _text(row), gate, str(row.get("usage", {}).get("completion_tokens", ""))]


def _saved(rows: Sequence[dict[str, Any]]) -> str:
    path = Path(tempfile.mkdtemp(prefix="captions-")) / "captions.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return str(path)
