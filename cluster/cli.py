"""The command line `sharegpt4v COMMAND [flags]`: each command is a module whose main does the work."""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.env import runtime_env


@dataclass(frozen=True, slots=True)
class Command:
    """module: where its main is. on_ray: it takes a runtime environment for other nodes."""

    module: str
    text: str
    on_ray: bool = False


COMMANDS = {
    "check": Command("pipelines.check", "look at every image of a manifest, without a model", on_ray=True),
    "caption": Command("pipelines.caption", "caption every image of a manifest, exactly once", on_ray=True),
    "compare": Command("pipelines.compare", "two finished captioning runs side by side, as one page"),
    "export": Command("pipelines.export", "write a finished run as LLaVA JSON, a HF data set, or tar shards"),
    "convert": Command("pipelines.convert", "turn a released checkpoint into one that others load"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command, 2 when there is no such command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sharegpt4v {importlib.metadata.version('sharegpt4v-platform')}")
        return 0
    name, *rest = arguments
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}" if near else f"known: {', '.join(COMMANDS)}"
        print(f"sharegpt4v: unknown command {name!r}; {meant}", file=sys.stderr)
        return 2
    run = importlib.import_module(command.module).main
    code: int = run(rest, runtime_env()) if command.on_ray else run(rest)
    return code


def _help() -> str:
    lines = [f"  {name:<10}{command.text}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sharegpt4v COMMAND [flags]",
            "",
            "From a heap of images to a served multimodal chat model, on Ray.",
            "",
            *lines,
            "",
            "sharegpt4v COMMAND --help lists its flags; they are the fields of its configuration file.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
