"""What a command that was interrupted says: what is saved, and how to go on."""

from pathlib import Path

from sharegpt4v.captions.finish import roll_forward
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import survey


def describe_interruption(run: CaptionRun, out: Path) -> str:
    """Counts what is saved, under the run's lock. out: the folder as the user names it."""
    roll_forward(run)  # the finish step may have been cut
    _, progress = survey(run)
    if not progress.done:
        return f"interrupted before the first commit: nothing is saved in {out}, the same command begins anew"
    saved = f"{progress.done:,} of {progress.rows:,} images are saved in {out}"
    return f"interrupted: {saved}; the same command goes on from there"
