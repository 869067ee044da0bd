"""`sharegpt4v serve`: the captioner and the chat model behind an OpenAI-style API."""

import sys
from collections.abc import Sequence

from cluster.command_line import Command, run_command
from sharegpt4v.config.serve import ServeConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ended by a signal, 1 failed, 2 wrong request."""
    return run_command(COMMAND, argv)


def serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or Ctrl-C."""
    from serve.logs import log_json
    from serve.settings import make_settings

    settings = make_settings(config)
    log_json()
    if config.without_ray:
        from serve.one_process import serve_here

        return serve_here(settings, config.host, config.port, config.drain_seconds)
    from serve.on_ray import serve_on_ray

    return serve_on_ray(config, settings)


def plan(config: ServeConfig) -> str:
    """Describes what would be served, after the checks that need no weight."""
    from serve.settings import make_settings

    settings = make_settings(config)
    lines = [f"{info.kind}: {info.id} ({spec.model}, {spec.dtype})" for info, spec in settings.models]
    door = f"{len(settings.keys)} keys" if settings.keys else "no key"
    where = "one process" if config.without_ray else f"Ray, {config.replicas} replicas each"
    return "\n".join([*lines, f"http://{config.host}:{config.port}/v1, {door}, {where}"])


COMMAND = Command("serve", ServeConfig, serve, plan)

if __name__ == "__main__":
    sys.exit(main())
