"""The toy models that come along: what the chain begins from, and what it ends with.

Each is a transformers folder: configuration, tokenizer and one safetensors file at half precision. The chat
model's is as `sharegpt4v convert` writes it, with processor and chat template, so that older transformers and
vLLM read it, too.
"""

import shutil
import tempfile
from pathlib import Path

from transformers import LlavaForConditionalGeneration, PreTrainedModel

from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.models.captioner import ShareCaptioner
from sharegpt4v.models.load import load_adapter
from sharegpt4v.toy.tokenizer import build_tokenizer

SHIPPED = Path(__file__).parent / "checkpoints"
"""`captioner` and `lmm`, which the model `toy` is, and `foundation`: the parts they were trained from."""

FOUNDATION = SHIPPED / "foundation"


def ship(product: Path, folder: Path) -> None:
    """Writes the end product of a training run to `folder` in the shipped form; what is there is replaced."""
    adapter = load_adapter(product)
    shutil.rmtree(folder, ignore_errors=True)
    write_half(adapter.model, folder)
    if isinstance(adapter.model, LlavaForConditionalGeneration):
        write_as_converted(folder)


def write_half(model: PreTrainedModel, folder: Path) -> None:
    """Writes a toy model with its tokenizer, at half precision; the model itself becomes that, too."""
    model.half().save_pretrained(folder)
    if model.can_generate() or isinstance(model, ShareCaptioner):
        decoder = model.language_model if isinstance(model, ShareCaptioner) else model
        decoder.generation_config.save_pretrained(folder)  # where other tools look for the end tokens
        build_tokenizer().save_pretrained(folder)


def write_as_converted(folder: Path) -> None:
    """Rewrites a LLaVA folder of transformers in place as `convert` would; tensors keep their bytes.

    The card of `convert` is left out: it speaks of a source and its terms, and here is none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "converted"
        planned = plan_conversion(folder)
        convert(planned, converted, shard_bytes=2 * planned.bytes)  # one file, whatever its size
        shutil.copytree(converted, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
