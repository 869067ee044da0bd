"""The demo's side of the API: models, streamed answers and captions, with the true reason of what fails."""

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai


class Failed(Exception):
    """What the user is shown: one line with the reason, as the API or the connection gave it."""


class ApiClient:
    """Talks to the API at `url`, which has no /v1 at its end."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._key = key or "none"

    def models(self) -> list[tuple[str, str]]:
        """Returns the id and kind of every model. Raises Failed."""
        try:
            answer = httpx.get(f"{self.url}/v1/models", headers=self._headers, timeout=10)
            answer.raise_for_status()
            return [(row["id"], row.get("kind", "chat")) for row in answer.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Failed(self._reason(error)) from error

    async def stream(
        self, model: str, messages: list[dict[str, Any]], temperature: float, max_tokens: int
    ) -> AsyncGenerator[str, None]:
        """Yields the answer's pieces; closing it stops the answer. Raises Failed."""
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self._key, max_retries=1) as client:
            try:
                body: Any = {"model": model, "messages": messages, "temperature": temperature}
                async with await client.chat.completions.create(
                    **body, max_tokens=max_tokens, stream=True
                ) as pieces:
                    async for chunk in pieces:
                        if chunk.choices and (text := chunk.choices[0].delta.content):
                            yield text
            except (openai.OpenAIError, httpx.HTTPError) as error:
                raise Failed(self._reason(error)) from error

    async def captions(self, model: str | None, files: Sequence[str]) -> list[dict[str, Any]]:
        """Returns a row for each image, with a caption or an error. Raises Failed."""
        uploads = [("image", (Path(file).name, Path(file).read_bytes())) for file in files]
        try:
            async with httpx.AsyncClient(headers=self._headers, timeout=600) as client:
                data = {"model": model} if model else {}
                answer = await client.post(f"{self.url}/v1/captions", files=uploads, data=data)
                answer.raise_for_status()
                rows: list[dict[str, Any]] = answer.json()["data"]
                return rows
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Failed(self._reason(error)) from error

    @property
    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._key}"}

    def _reason(self, error: Exception) -> str:
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            return str(body.get("message") or error.message)
        if isinstance(error, httpx.HTTPStatusError):
            try:
                return str(error.response.json()["error"]["message"])
            except (ValueError, KeyError, TypeError):
                return f"the API answered {error.response.status_code}"
        if isinstance(error, openai.APIConnectionError | httpx.TransportError):
            return f"no connection to the API at {self.url}: is `sharegpt4v serve` running?"
        return " ".join(str(error).split()) or type(error).__name__
