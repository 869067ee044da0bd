"""POST /v1/captions: one image or a batch, as JSON with data URLs or as uploaded files."""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from serve.chat import whole_answer
from serve.dialogues import caption_call
from serve.errors import ApiError, refused
from serve.images import data_of, pixels
from serve.limits import Limits
from serve.model import Backend
from serve.wire import CaptionRequest, parse
from sharegpt4v.dialogue import Completion
from sharegpt4v.gate import GateRules, check_caption
from sharegpt4v.prompts import UNIFIED_CAPTION

_FORM_NUMBERS = ("max_tokens", "top_k", "seed", "temperature", "top_p", "repetition_penalty")

_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """How captions are decoded unless a request says otherwise, and judged: as `sharegpt4v caption` does."""

    max_new_tokens: int = 500
    repetition_penalty: float = 1.0
    gate: GateRules = GateRules()


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of a request. data: its bytes, or its data URL. name: the file's, as the client gave it."""

    data: bytes | str
    where: str
    name: str | None = None


async def read_request(request: Request, limits: Limits) -> tuple[CaptionRequest, list[Picture]]:
    """Reads the body of either kind. Raises ApiError for one without images or with too many."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        body, pictures = await _read_form(request, limits)
    else:
        body = parse(CaptionRequest, await request.body())
        if body.image is not None and body.images is not None:
            raise refused("give image or images, not both", "images")
        one = body.image is not None
        urls = [body.image] if body.image is not None else body.images or []
        pictures = [Picture(url, "image" if one else f"images.{n}") for n, url in enumerate(urls)]
    if not 0 < len(pictures) <= limits.batch:
        raise refused(f"{len(pictures)} images: give 1 to {limits.batch}", "images", "wrong_number_of_images")
    if body.max_tokens is not None and body.max_tokens > limits.tokens:
        raise refused(f"{body.max_tokens} tokens are too many, {limits.tokens} at most", "max_tokens")
    return body, pictures


async def _read_form(request: Request, limits: Limits) -> tuple[CaptionRequest, list[Picture]]:
    """Reads an uploaded form: files under any of the names image, images, file; other fields as in JSON."""
    fields: dict[str, Any] = {}
    pictures: list[Picture] = []
    async with request.form(max_files=limits.batch, max_fields=20) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name.removesuffix("[]") not in ("image", "images", "file"):
                    raise refused(f"unknown file field {name[:80]}", name[:80], "unknown_parameter")
                pictures.append(Picture(await value.read(), name, value.filename))
            elif name in fields:
                raise refused(f"{name[:80]} is given twice", name[:80])
            else:
                fields[name] = _number(name, value)
    try:
        body = CaptionRequest.model_validate(fields, strict=True)
    except ValueError:
        body = parse(CaptionRequest, json.dumps(fields).encode())  # for its plain errors
    if body.image is not None or body.images is not None:
        raise refused("a form's images are files, not texts", "image")
    return body, pictures


def _number(name: str, text: str) -> Any:
    """Reads a field as JSON would have it: Python's own numbers may be 1_000 or NaN."""
    if name not in _FORM_NUMBERS:
        return text
    if not _JSON_NUMBER.fullmatch(text):
        raise refused(f"{name} must be a number", name)
    return json.loads(text)


async def caption_all(
    body: CaptionRequest,
    pictures: Sequence[Picture],
    backend: Backend,
    rules: CaptionRules,
    limits: Limits,
    request_id: str,
) -> dict[str, Any]:
    """Captions all images together; of several, one that cannot be read has an error instead of a caption.

    Raises ApiError when a lone image cannot be read, and when the model fails.
    """
    results = await asyncio.gather(
        *(
            _caption(body, picture, number, backend, rules, limits, f"{request_id}-{number}")
            for number, picture in enumerate(pictures)
        ),
        return_exceptions=True,
    )
    rows = []
    for number, (picture, result) in enumerate(zip(pictures, results, strict=True)):
        if isinstance(result, ApiError) and result.status == 400 and len(pictures) > 1:
            result = {"index": number, "filename": picture.name, "caption": None, **result.body()}
        if isinstance(result, BaseException):
            raise result
        rows.append(result)
    spent = [row["usage"] for row in rows if "usage" in row]
    total = {name: sum(one[name] for one in spent) for name in ("prompt_tokens", "completion_tokens")}
    return {
        "id": request_id,
        "object": "list",
        "model": backend.info.id,
        "data": rows,
        "usage": {**total, "total_tokens": sum(total.values())},
    }


async def _caption(
    body: CaptionRequest,
    picture: Picture,
    number: int,
    backend: Backend,
    rules: CaptionRules,
    limits: Limits,
    call_id: str,
) -> dict[str, Any]:
    info = backend.info

    def decode() -> Any:
        data = data_of(picture.data, picture.where) if isinstance(picture.data, str) else picture.data
        return pixels(data, info.images, limits, picture.where)

    image = await asyncio.to_thread(decode)
    sampling = body.sampling(
        body.max_tokens or min(rules.max_new_tokens, limits.tokens),
        repetition_penalty=rules.repetition_penalty,
    )
    prompt = UNIFIED_CAPTION.text if body.prompt is None else body.prompt
    call = caption_call(image, prompt, sampling, limits, call_id)
    if body.max_tokens is None:
        call = replace(call, given_limit=False)
    completion, _ = await whole_answer(backend.answer(call))
    return {"index": number, "filename": picture.name, **_row(completion, rules.gate)}


def _row(completion: Completion, gate: GateRules) -> dict[str, Any]:
    verdict = check_caption(completion.text, completion.finish_reason, gate)
    return {
        "caption": completion.text,
        "finish_reason": completion.finish_reason,
        "verdict": {
            "accepted": verdict is None,
            "reason": verdict and verdict.reason,
            "message": verdict and verdict.message,
        },
        "usage": {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.tokens},
    }
