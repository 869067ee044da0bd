"""Makes the toy world's images, dialogues and foundation models: `python -m sharegpt4v.toy COMMAND`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from sharegpt4v.atomic import write_atomic
from sharegpt4v.errors import UserError
from sharegpt4v.toy.images import iter_write_images
from sharegpt4v.toy.questions import CONVERSATIONS
from sharegpt4v.toy.scene import make_scene
from sharegpt4v.toy.sources import OBJECTS_BY_DIFFICULTY, SOURCES
from sharegpt4v.toy.truth import TRUTH_FILE


class Command(NamedTuple):
    """One subcommand. add_flags: declares its flags. run: executes it and may raise UserError."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or 2 after one line on stderr about what the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m sharegpt4v.toy", description="The toy world.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_flags(commands.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except UserError as error:
        line = f"--{error.field.replace('_', '-')}: {error.text}" if error.field else str(error)
        print(f"toy {args.command}: {line}", file=sys.stderr)
        return 2
    return 0


def _image_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder, made where it is missing")
    parser.add_argument("--count", type=int, default=256, help="images, the sources in turn (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (%(default)s)")
    parser.add_argument(
        "--difficulty",
        type=int,
        default=1,
        choices=sorted(OBJECTS_BY_DIFFICULTY),
        help="1: one to three shapes, well apart; 3: up to seven, overlapping (%(default)s)",
    )
    parser.add_argument(
        "--longest-side", type=int, metavar="PX", help="draw them smaller, 128 say, and ten times as fast"
    )


def _write_images(args: argparse.Namespace) -> None:
    scenes = iter_write_images(
        args.out, args.count, seed=args.seed, difficulty=args.difficulty, longest_side=args.longest_side
    )
    for _ in track(scenes, "toy images", total=args.count, console=Console(stderr=True)):
        pass
    print(f"{args.count} images and their truth: {args.out / TRUTH_FILE}")


def _dialogue_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="JSON file, as LLaVA's training reads it")
    parser.add_argument("--kind", choices=sorted(CONVERSATIONS), default="questions", help="(%(default)s)")
    parser.add_argument("--count", type=int, default=256, help="scenes, as for images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the world, as for images (%(default)s)")


def _write_dialogues(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise UserError(f"{args.count} is too few: give 1 or more", field="count")
    names = tuple(SOURCES)
    scenes = (make_scene(args.seed, n, source=names[n % len(names)]) for n in range(args.count))
    write_atomic(args.out, json.dumps([CONVERSATIONS[args.kind](scene) for scene in scenes], indent=1))
    print(f"{args.count} conversations: {args.out}")


def _foundation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="gets a subfolder a part (default: where the shipped ones are)"
    )
    parser.add_argument("--steps", type=int, help="of every part (default: as the shipped ones)")


def _make_foundation(args: argparse.Namespace) -> None:
    from sharegpt4v.toy.foundation import LENGTHS, make_foundation
    from sharegpt4v.toy.shipped import FOUNDATION

    if args.steps is not None and args.steps < 1:
        raise UserError(f"{args.steps} is too few: give 1 or more", field="steps")
    lengths = {part: replace(each, steps=args.steps or each.steps) for part, each in LENGTHS.items()}
    out = args.out or FOUNDATION
    for part, at in make_foundation(out, lengths):
        print(f"{part}  step {at.step}/{at.steps}  loss {at.loss:.3f}  {at.seconds:.0f} s", flush=True)
    print(f"written to {out}")


COMMANDS: dict[str, Command] = {
    "images": Command("write rendered scenes, their captions and their truth", _image_flags, _write_images),
    "dialogues": Command(
        "write conversations about the scenes of `images`", _dialogue_flags, _write_dialogues
    ),
    "foundation": Command(
        "pre-train the parts that the toy chain begins from", _foundation_flags, _make_foundation
    ),
}

if __name__ == "__main__":
    sys.exit(main())
