"""Between the chat that Gradio shows and the messages of the API, and the file of thumbs."""

import base64
import html
import json
import mimetypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ERROR = "error"
"""Marks, in a message's metadata, what the demo itself says: it is no answer, and is not sent to the API."""


def question(text: str, files: Sequence[str]) -> dict[str, Any]:
    """Makes the user's message as Gradio shows it: images before the text, which is escaped.

    Gradio renders tags in messages whatever its settings say; `parts` gives the plain text back.
    """
    text = html.escape(text, quote=False)
    return {"role": "user", "content": [*({"path": file} for file in files), *([text] if text else [])]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": html.escape(text, quote=False)}


def failure(reason: str) -> dict[str, Any]:
    """Makes the message that is shown in place of an answer."""
    return {
        "role": "assistant",
        "content": html.escape(f"No answer: {reason}", quote=False),
        "metadata": {"title": ERROR},
    }


def parts(message: dict[str, Any]) -> tuple[str, list[str]]:
    """Returns a shown message's text and its image files, in whichever form Gradio hands it back."""
    content = message["content"]
    texts, files = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text":
            texts.append(part["text"])
        else:
            files.append((part.get("file") or part)["path"])
    return html.unescape("\n".join(texts)), files


def is_failure(message: dict[str, Any]) -> bool:
    return (message.get("metadata") or {}).get("title") == ERROR


def api_messages(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the dialogue for the API. A question that failed or was stopped before any word is left out."""
    messages: list[dict[str, Any]] = []
    for message in history:
        text, files = parts(message)
        if message["role"] == "assistant":
            if is_failure(message) or not text:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": text})
            continue
        if messages and messages[-1]["role"] == "user":
            messages.pop()  # stopped before its answer began
        images = [{"type": "image_url", "image_url": {"url": data_url(Path(file))}} for file in files]
        messages.append(
            {"role": "user", "content": [*images, *([{"type": "text", "text": text}] if text else [])]}
        )
    return messages


def data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    kind = (
        kind if kind.startswith("image/") else "image/png"
    )  # the server looks at the bytes and says what is wrong
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def append_feedback(path: Path, history: Sequence[dict[str, Any]], index: int, liked: bool | str) -> None:
    """Appends a line of JSON: when, which thumb, and the dialogue's texts up to it. Images are not kept."""
    shown = [
        {"role": one["role"], "text": parts(one)[0], "images": len(parts(one)[1])}
        for one in history[: index + 1]
    ]
    thumb = "up" if liked in (True, "Like") else "down"
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "thumb": thumb, "dialogue": shown}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
