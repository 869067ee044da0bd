"""Vanilla vLLM, in a process that knows nothing of us, loads our checkpoints; skips where vLLM is missing."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.load import load_adapter
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import make_scene
from sharegpt4v.toy.shipped import SHIPPED
from tests.checkpoints import released
from tests.checkpoints.released import llava_tensors, save_llava, save_tower, tower_tensors
from tests.commands import environment
from tests.engine.requests import END, is_a_tie, needs_vllm, torch_answers

PROMPT = UNIFIED_CAPTION.text

_VANILLA = """
import json, sys
from PIL import Image
import vllm
asked = json.load(sys.stdin)
llm = vllm.LLM(model=asked["model"], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**26,
               max_model_len=512)
params = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"])
if "url" in asked:
    image = {"type": "image_url", "image_url": {"url": asked["url"]}}
    content = [image, {"type": "text", "text": asked["text"]}]
    outputs = llm.chat([{"role": "user", "content": content}], params)
else:
    image = Image.new("RGB", (asked["size"],) * 2, (200, 30, 90))
    prompt = {"prompt_token_ids": asked["ids"], "multi_modal_data": {"image": image}}
    outputs = llm.generate([prompt], params)
assert not any(name.startswith("sharegpt4v") for name in sys.modules)
print("\\n" + json.dumps([outputs[0].outputs[0].text, list(outputs[0].outputs[0].token_ids)]))
"""


def _vanilla(**asked: Any) -> tuple[str, list[int]]:
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _VANILLA],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment() | quiet,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    text, tokens = json.loads(done.stdout.rstrip().rsplit("\n", 1)[1])
    return text, tokens


@needs_vllm
def test_vanilla_vllm_chats_with_a_checkpoint_of_ours_as_the_torch_engine_does(tmp_path: Path) -> None:
    convert(plan_conversion(SHIPPED / "lmm"), tmp_path / "out", 10**9)
    pixels = np.array(render(make_scene(5, 2, source="coco", difficulty=3), (48, 48)))
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "png")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    text, _ = _vanilla(model=str(tmp_path / "out"), url=url, text=PROMPT, tokens=200)
    engine = TorchEngine(load_adapter(SHIPPED / "lmm"), "lmm@0", capacity=1)
    request = Request("r", (Turn("user", PROMPT, (pixels,)),), SamplingParams(max_new_tokens=200))
    assert text.strip() == engine.submit(request).result(60).text
    engine.close()


@needs_vllm
def test_vanilla_vllm_runs_a_converted_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "HEADS", 2)  # vLLM has no kernel for heads of 16
    model = save_llava(tmp_path / "ShareGPT4V-7B", llava_tensors())
    tower = save_tower(tmp_path / "tower", tower_tensors())
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "out", 300_000)
    adapter = load_adapter(tmp_path / "out")
    image = np.full((28, 28, 3), (200, 30, 90), np.uint8)
    request = Request("r", (Turn("user", "tata", (image,)),), SamplingParams(max_new_tokens=12))
    first, second = adapter.template.segments(request.turns)
    ids = [*first, adapter.template.image_token_id, *second]
    _, tokens = _vanilla(model=str(tmp_path / "out"), ids=ids, size=28, tokens=12)
    tokens = [END if token in adapter.eos_token_ids else token for token in tokens]
    ours = torch_answers(adapter, [request], 1)["r"]
    assert tokens == ours or is_a_tie(adapter, request, tokens, ours)
