"""Which prompts are answered together, and how their tensors are joined."""

import torch

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.static_batches import Prompt, choose_batch, join


def _prompt(tokens: int, patches: int = 4, width: int = 6) -> Prompt:
    inputs = {
        "input_ids": torch.arange(1, tokens + 1)[None],
        "attention_mask": torch.ones(1, tokens, dtype=torch.long),
        "cross_mask": torch.ones(1, tokens, 2),
    }
    if patches:
        inputs["pixel_values"] = torch.full((patches, width), float(tokens))
    return Prompt(Handle(Request("r", (Turn("user", "?"),))), inputs, limit=8)


def test_a_batch_holds_the_oldest_prompt_and_none_that_pads_too_much() -> None:
    lengths = {7: 20, 0: 31, 3: 14, 2: 9, 5: 21, 1: 13}
    prompts = {slot: _prompt(tokens) for slot, tokens in lengths.items()}
    chosen = choose_batch(prompts)
    assert [lengths[slot] for slot in chosen] == [14, 20, 21]
    rest = {slot: prompt for slot, prompt in prompts.items() if slot not in chosen}
    assert [lengths[slot] for slot in choose_batch(rest)] == [31]


def test_prompts_whose_images_do_not_fit_together_are_not_joined() -> None:
    prompts = {0: _prompt(10), 1: _prompt(10, width=7), 2: _prompt(10, patches=0), 3: _prompt(10, patches=9)}
    assert choose_batch(prompts) == [0, 3]
    assert choose_batch({slot: prompts[slot] for slot in (2, 1)}) == [2]


def test_text_is_padded_on_the_left_and_images_follow_each_other() -> None:
    batch = join([_prompt(2), _prompt(3, patches=1)], pad_token=99, device=torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[99, 1, 2], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["cross_mask"].tolist() == [[[0, 0], [1, 1], [1, 1]], [[1, 1]] * 3]
    assert batch["pixel_values"][:, 0].tolist() == [2, 2, 2, 2, 3]
