"""What a configuration comes to: models, limits, rules and keys; refused here, before anything starts."""

from dataclasses import dataclass

from serve.captions import CaptionRules
from serve.dialogues import ModelInfo
from serve.keys import is_loopback, read_keys
from serve.limits import Limits
from serve.models import EngineOptions, Kind, plan_model
from sharegpt4v.config.serve import MOST_IN_FLIGHT, NONE, ServeConfig
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.engine.fake import FakeOptions
from sharegpt4v.errors import UserError
from sharegpt4v.gate import GateRules


@dataclass(frozen=True, slots=True)
class Settings:
    """models: each with what the API must know of it, and how its engine is built."""

    models: tuple[tuple[ModelInfo, EngineSpec], ...]
    limits: Limits
    captions: CaptionRules
    keys: dict[str, str]
    hang_seconds: float
    log_texts: bool


def make_settings(config: ServeConfig) -> Settings:
    """Checks a configuration. Raises UserError for a missing model, or an open door without keys."""
    keys = read_keys(config.api_keys) if config.api_keys else {}
    if not keys and not is_loopback(config.host):
        raise UserError(
            f"{config.host} can be reached from elsewhere: give `api_keys`, or 127.0.0.1", field="host"
        )
    options = EngineOptions(
        engine=config.engine,
        dtype=config.dtype,
        slots=config.slots,
        max_context=config.max_context,
        threads=config.threads_per_replica,
        use_gpu=config.gpus_per_replica > 0,
        fake=FakeOptions(**{**config.fake.model_dump(), "requests_at_once": config.slots}),
    )
    wanted: list[tuple[Kind, str, str | None]] = [
        ("captioner", config.captioner, config.captioner_name),
        ("chat", config.chat, config.chat_name),
    ]
    models = tuple(plan_model(kind, path, options, name) for kind, path, name in wanted if path != NONE)
    if not models:
        raise UserError("neither this nor `captioner` names a model to serve", field="chat")
    names = [info.id for info, _ in models]
    if len(set(names)) < len(names):
        raise UserError(f"both models are called {names[0]}: give another name", field="chat_name")
    gate = GateRules(config.gate.min_characters, script=config.gate.script)
    rules = CaptionRules(config.captions.max_new_tokens, config.captions.repetition_penalty, gate)
    return Settings(models, _limits(config, len(models)), rules, keys, config.hang_seconds, config.log_texts)


def _limits(config: ServeConfig, models: int) -> Limits:
    given = config.limits
    most_replicas = int(config.replicas.split(":")[-1])
    return Limits(
        in_flight=given.in_flight or min(4 * config.slots * models * most_replicas, MOST_IN_FLIGHT),
        per_key=given.per_key,
        per_minute=given.per_minute,
        body_bytes=int(given.body_megabytes * 1e6),
        body_seconds=given.body_seconds,
        pixels=int(given.megapixels * 1e6),
        images=given.images,
        batch=given.batch,
        tokens=given.tokens,
        request_seconds=given.request_seconds,
    )
