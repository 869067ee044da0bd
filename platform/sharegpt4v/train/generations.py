"""What the model says of fixed images while it trains, at every checkpoint, for the report."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.errors import Rejected
from sharegpt4v.train.backend import Backend
from sharegpt4v.train.packed_model import PackedModel
from sharegpt4v.train.samples import SampleMaker

GENERATIONS = "generations.jsonl"
"""In the run folder: lines {step, id, question, said, wanted}."""

IMAGES = 4
MAX_NEW_TOKENS = 96


def generator(model: PackedModel, backend: Backend, maker: SampleMaker, run: Path) -> Callable[[int], None]:
    """Returns a function from a step to IMAGES new lines of GENERATIONS.

    It answers the first question of the first records with a usable image, greedily. All workers call it
    together, and the first one generates.
    """
    chosen = list(_chosen(maker)) if backend.worker == 0 else []

    def generate(step: int) -> None:
        with backend.whole():
            if backend.worker == 0:
                write(step)

    def write(step: int) -> None:
        lines = []
        for name, turn, wanted in chosen:
            said = _answer(model, turn)
            line = {"step": step, "id": name, "question": turn.text, "said": said, "wanted": wanted}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with open(run / GENERATIONS, "a", encoding="utf-8") as file:
            file.writelines(lines)

    return generate


def _chosen(maker: SampleMaker) -> Iterator[tuple[str, Turn, str]]:
    found = 0
    for number in range(len(maker.records)):
        record = maker.records[number]
        if found == IMAGES:
            return
        if record.conversation.image_turn != 0:
            continue
        try:
            sample = maker.decode(maker.encode(number))
        except Rejected:
            continue
        found += 1
        question = maker.rules.question or record.conversation.texts[0]
        yield record.id, Turn("user", question, sample.images), record.conversation.texts[1]


def _answer(model: PackedModel, turn: Turn) -> str:
    """Generates one answer; at most its first line where the template ends captions with a newline."""
    adapter = model.adapter
    with _as_for_inference(model), torch.no_grad():
        [prompt] = adapter.embed([Request("sample", (turn,))])
        ids = adapter.language_model.generate(
            inputs_embeds=prompt.clone()[None],
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long, device=prompt.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=sorted(adapter.eos_token_ids),
            pad_token_id=adapter.tokenizer.pad_token_id,
        )
    text: str = adapter.tokenizer.decode(ids[0], skip_special_tokens=True)
    return text.strip().split("\n")[0]


@contextmanager
def _as_for_inference(model: PackedModel) -> Iterator[None]:
    """Gives the decoder ordinary attention, as packed attention has no cache."""
    config = model.decoder.config
    packed = config._attn_implementation
    config._attn_implementation = "sdpa"
    model.eval()
    try:
        yield
    finally:
        config._attn_implementation = packed
        model.train()
