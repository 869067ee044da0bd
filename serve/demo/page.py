"""The page: a tab to chat about images and one to caption them. A model's words are shown as plain text."""

import html
import json
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from serve.demo.client import ApiClient, Failed
from serve.demo.dialogue import answer, api_messages, append_feedback, failure, parts, question
from sharegpt4v.prompts import UNIFIED_CAPTION

IMAGE_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif"]

CSS = """
.gradio-container { max-width: 900px !important; margin: auto; }
button[aria-label*="hare" i], button[title*="hare" i] { display: none !important; }
#captions table { width: 100%; border-collapse: collapse; }
#captions th, #captions td { text-align: left; padding: 6px; vertical-align: top; overflow-wrap: anywhere; }
@media (max-width: 600px) { .gradio-container { padding: 4px !important; } button { min-height: 44px; } }
"""

History = list[dict[str, Any]]


def build_page(api: ApiClient, examples: Sequence[Path], feedback: Path) -> Any:
    """Makes the page. examples: images to begin with; feedback: where thumbs are appended."""
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


def _chat_tab(api: ApiClient, examples: Sequence[Path], feedback: Path) -> gr.Dropdown:
    chat = gr.Chatbot(
        label="Dialogue",
        height=420,
        editable="user",
        render_markdown=False,
        allow_tags=False,
        buttons=["copy"],
        elem_id="chat",
        placeholder="Upload or paste an image and ask about it.",
    )
    box = gr.MultimodalTextbox(
        label="Your question, with images",
        placeholder="Ask about an image",
        file_types=IMAGE_TYPES,
        file_count="multiple",
        sources=["upload"],
        stop_btn=True,
        max_plain_text_length=20_000,
        elem_id="question",
    )
    with gr.Row():
        retry, clear = gr.Button("Retry", elem_id="retry"), gr.Button("Clear", elem_id="clear")
    if examples:
        rows = [{"text": UNIFIED_CAPTION.text, "files": [str(path)]} for path in examples]
        gr.Examples(rows, box, label="Examples", examples_per_page=4)
    with gr.Accordion("Settings", open=False):
        model = gr.Dropdown([], label="Model", allow_custom_value=True)
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: the most likely words)")
        length = gr.Slider(1, 1024, 256, step=1, label="Longest answer, in tokens")

    async def reply(history: History, name: str, warmth: float, most: int) -> AsyncGenerator[History, None]:
        """Streams the answer. A failure is a message: an error raised here would leave the box dead."""
        shown = ""
        try:
            async with aclosing(api.stream(name, api_messages(history), warmth, int(most))) as pieces:
                async for piece in pieces:
                    shown += piece
                    yield [*history, answer(shown)]
        except Failed as error:
            gr.Warning(str(error))
            yield [*history, failure(str(error))]
            return
        if not shown:
            yield [*history, failure("the model said nothing")]

    def ask(given: dict[str, Any], history: History) -> tuple[Any, History]:
        if not given["text"].strip() and not given["files"]:
            return gr.skip(), history
        files = [file if isinstance(file, str) else file["path"] for file in given["files"]]
        return {"text": "", "files": []}, [*history, question(given["text"].strip(), files)]

    def undo(history: History) -> History:
        """Returns the dialogue up to its last question."""
        last = max((n for n, one in enumerate(history) if one["role"] == "user"), default=-1)
        return history[: last + 1]

    def edited(history: History, event: gr.EditData) -> History:
        place = event.index[0] if isinstance(event.index, list | tuple) else event.index
        _, files = parts(history[place])
        text, _ = parts({"content": event.value})
        return [*history[:place], question(text, files)]

    def liked(history: History, event: gr.LikeData) -> None:
        place = event.index[0] if isinstance(event.index, list | tuple) else event.index
        append_feedback(feedback, history, place, event.liked)

    settings = [chat, model, temperature, length]
    running = []
    for begin in (
        box.submit(ask, [box, chat], [box, chat]),
        retry.click(undo, chat, chat),
        chat.retry(undo, chat, chat),
        chat.edit(edited, chat, chat),
    ):
        running.append(begin.then(_unless_idle(reply), settings, chat))
    box.stop(None, cancels=running)
    clear.click(lambda: [], None, chat, cancels=running)
    chat.like(liked, chat, None)
    return model


def _unless_idle(reply: Any) -> Any:
    """Answers only a dialogue whose last message is a question: an empty one was not sent."""

    async def run(history: History, name: str, warmth: float, most: int) -> AsyncGenerator[History, None]:
        if not history or history[-1]["role"] != "user":
            yield history
            return
        async with aclosing(reply(history, name, warmth, most)) as shown:
            async for one in shown:
                yield one

    return run


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
