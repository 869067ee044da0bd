"""From a configuration of captioning to what will run: the engine, what it is asked, what may not change."""

from dataclasses import dataclass, replace
from typing import Any

from pipelines.steps.captioning import CaptionRules
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import survey
from sharegpt4v.checkpoints.card import read_card
from sharegpt4v.config.caption import CaptionConfig
from sharegpt4v.dialogue import ImageProtocol, SamplingParams
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.engine.fake import FakeOptions
from sharegpt4v.engine.vllm_install import require_vllm
from sharegpt4v.errors import UserError
from sharegpt4v.gate import GateRules
from sharegpt4v.prompts import UNIFIED_CAPTION, Prompt
from sharegpt4v.run.settings import check_fingerprint


@dataclass(frozen=True, slots=True)
class Plan:
    """What the configuration comes to: which engine, asked how, over images of which shape."""

    spec: EngineSpec
    rules: CaptionRules
    image_size: int
    protocol: ImageProtocol
    fingerprint: dict[str, Any]


def make_plan(config: CaptionConfig) -> Plan:
    """Resolves model, prompt and rules without loading a weight. Raises UserError for what does not exist."""
    if config.engine == "fake":
        model, weights, size, protocol = "fake@0", None, config.fake.image_side, config.protocol or "squash"
    else:
        if config.engine == "vllm":
            _refuse_for_vllm(config)
        card = read_card(config.model)
        # A URI goes to the actors as it is: each node fetches it once into its own cache. So does `toy`: the
        # library brings it along, and has another path on every node.
        weights = (
            config.model if config.model == "toy" or "://" in config.model else str(card.folder.absolute())
        )
        model, size, protocol = card.id, card.image_size, config.protocol or card.protocol
    decoding = config.decoding
    sampling = SamplingParams(
        max_new_tokens=decoding.max_new_tokens,
        min_new_tokens=decoding.min_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        repetition_penalty=decoding.repetition_penalty,
    )
    retry = replace(sampling, temperature=decoding.retry_temperature, top_p=decoding.retry_top_p)
    prompt = UNIFIED_CAPTION if config.prompt is None else Prompt.of_user(config.prompt)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if config.gpus_per_actor else "float32"
    spec = EngineSpec(
        kind=config.engine,
        model=model,
        weights=weights,
        capacity=config.batch_size,
        room_for=(prompt.text, decoding.max_new_tokens),
        dtype=dtype,
        threads=config.threads_per_actor,
        use_gpu=config.gpus_per_actor > 0,
        fake=FakeOptions(**config.fake.model_dump()),
    )
    absent = set() if decoding.min_new_tokens else {"min_new_tokens"}  # as in runs from before this flag
    fingerprint = {
        "model": model,
        "prompt": f"{prompt.id}: {prompt.text}",
        "protocol": protocol,
        "image_size": size,
        "fast_decode": config.fast_decode,
        "dtype": dtype,
        # Its sampler draws other numbers and its kernels break ties another way.
        **({"engine": "vllm"} if config.engine == "vllm" else {}),
        **{f"decoding.{key}": value for key, value in decoding.model_dump(exclude=absent).items()},
        **{f"gate.{key}": value for key, value in config.gate.model_dump().items()},
    }
    rules = CaptionRules(prompt, sampling, retry, GateRules(**config.gate.model_dump()))
    return Plan(spec, rules, size, protocol, fingerprint)


def _refuse_for_vllm(config: CaptionConfig) -> None:
    """At once and not in an actor; of a cluster's machines nothing is known here."""
    if config.address is None:
        require_vllm()
    if 0 < config.gpus_per_actor < 1:
        raise UserError(
            f"--gpus-per-actor is {config.gpus_per_actor:g}: a vllm engine takes the memory of a whole GPU, "
            f"give 1"
        )


def describe_plan(config: CaptionConfig) -> str:
    """What `--dry-run` adds: the model that would run, and what a resume would find. Nothing is written."""
    plan = make_plan(config)
    lines = [f"# model {plan.spec.model}, images {plan.image_size} px by protocol {plan.protocol}"]
    if (config.out / "run.yaml").exists():
        run = CaptionRun(config.out.absolute())
        check_fingerprint(run, plan.fingerprint)
        _, progress = survey(run, config.retry_rejects)
        lines.append(f"# resumes {run.path}: {progress.done:,} of {progress.rows:,} images are done")
    else:
        lines.append(f"# begins a new run in {config.out.absolute()}")
    return "\n".join(lines)
