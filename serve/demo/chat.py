"""What happens in the chat tab: a question sent, an answer streamed, retried, edited and rated."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from serve.demo.client import ApiClient, Failed
from serve.demo.dialogue import answer, api_messages, append_feedback, failure, parts, question

History = list[dict[str, Any]]


class Chat:
    """Answers the events of the page; it holds no dialogue, since each browser has its own."""

    def __init__(self, api: ApiClient, feedback: Path) -> None:
        self._api, self._feedback = api, feedback

    async def reply(
        self, history: History, name: str, temperature: float, length: int
    ) -> AsyncGenerator[History, None]:
        """Streams the answer to a dialogue whose last message is a question: an empty one was not sent.

        A failure is a message: an error raised here would leave the box for questions without function.
        """
        if not history or history[-1]["role"] != "user":
            yield history
            return
        shown = ""
        pieces = self._api.stream(name, api_messages(history), temperature, int(length))
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    shown += piece
                    yield [*history, answer(shown)]
        except Failed as error:
            gr.Warning(str(error))
            yield [*history, failure(str(error))]
            return
        if not shown:
            yield [*history, failure("the model said nothing")]

    def ask(self, given: dict[str, Any], history: History) -> tuple[Any, History]:
        """Returns the emptied box and the dialogue with its question."""
        if not given["text"].strip() and not given["files"]:
            return gr.skip(), history
        files = [file if isinstance(file, str) else file["path"] for file in given["files"]]
        return {"text": "", "files": []}, [*history, question(given["text"].strip(), files)]

    def undo(self, history: History) -> History:
        """Returns the dialogue up to its last question."""
        last = max((n for n, one in enumerate(history) if one["role"] == "user"), default=-1)
        return history[: last + 1]

    def edit(self, history: History, event: gr.EditData) -> History:
        """Returns the dialogue up to the question that was edited, in its new words."""
        place = _place(event)
        _, files = parts(history[place])
        text, _ = parts({"content": event.value})
        return [*history[:place], question(text, files)]

    def like(self, history: History, event: gr.LikeData) -> None:
        """Appends a thumb to the file of feedback."""
        append_feedback(self._feedback, history, _place(event), event.liked)


def _place(event: Any) -> int:
    """Returns the number of the message an event is about."""
    place = event.index[0] if isinstance(event.index, list | tuple) else event.index
    return int(place)
