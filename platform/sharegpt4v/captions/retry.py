"""A retry of rejects that a kill cut: the same command goes on with it and tries none of them twice.

work/retry.json says since which session a retry is under way. It ends when the run is finished, or when too
many rejects stopped it.
"""

import json

from sharegpt4v.atomic import write_atomic
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.notes import read_note
from sharegpt4v.captions.sessions import next_session
from sharegpt4v.credentials import without_credentials


def retry_since(run: CaptionRun, reason: str, root: str) -> int:
    """Returns the first session of this retry: one that is under way, or the session that begins next.

    reason: which rejects, or all. root: where the images are; below another one all are tried again.
    """
    known = read_note(run.retry) or {}
    if (known.get("reason"), known.get("root")) == (reason, without_credentials(root)):
        return int(known["since"])
    return next_session(run)


def note_retry(run: CaptionRun, reason: str, root: str, since: int) -> None:
    """Notes a retry before its first session begins."""
    content = {"reason": reason, "root": without_credentials(root), "since": since}
    write_atomic(run.retry, json.dumps(content))


def end_retry(run: CaptionRun) -> None:
    """Lets the next command with the same reason try all such rejects again."""
    run.retry.unlink(missing_ok=True)
