"""Look at every image of a manifest without a model: `python -m pipelines.check --images DIR`.

Reports what is missing, broken, oversized or there twice, by source, before a captioner costs anything.
"""

import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipelines.isolation import Isolation
from pipelines.ledger import LedgerClient, RemoteLedger
from pipelines.progress import ProgressBar
from pipelines.session import quiet_data_context, ray_session
from pipelines.steps import KILLED_WORKER, KILLED_WORKER_MESSAGE, Columns
from pipelines.table import print_counts
from sharegpt4v.config import CheckConfig
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.flags import EXIT_PROBLEM, run_command
from sharegpt4v.images import ImageReader, inspect
from sharegpt4v.manifest import Manifest, normalise
from sharegpt4v.records import REJECTS
from sharegpt4v.run.folder import write_atomic

KINDS = ("missing", "broken", "oversized", "duplicate")

_OVERSIZED = {"too_large", "too_many_bytes", "bad_aspect", "bomb"}

_ROWS_PER_BLOCK = 256


def main(argv: Sequence[str] | None = None, runtime_env: dict[str, Any] | None = None) -> int:
    """Returns the exit code: 0 looked, 1 found something and --strict is given, 2 wrong request."""
    return run_command(
        "check",
        CheckConfig,
        partial(check, runtime_env=runtime_env),
        sys.argv[1:] if argv is None else argv,
    )


class Inspect:
    """Manifest columns in; id, image, source, sha256 (hex), reason and message out, in the same order."""

    def __init__(self, reader: ImageReader, ledger: LedgerClient) -> None:
        self._reader = reader
        self._ledger = ledger

    def __call__(self, batch: Columns) -> Columns:
        count = len(batch["id"])
        out: Columns = {
            **{name: batch[name] for name in ("id", "image", "source")},
            **{name: np.full(count, "", dtype=object) for name in ("sha256", "reason", "message")},
        }
        isolation = Isolation(self._ledger, "check")
        ids = [str(key) for key in batch["id"]]
        for row in isolation.run(ids, lambda rows: self._inspect(batch, rows, out)):
            out["reason"][row], out["message"][row] = KILLED_WORKER, KILLED_WORKER_MESSAGE
        reasons = Counter(reason for reason in out["reason"] if reason)
        self._ledger.count(count - reasons.total(), dict(reasons))
        return out

    def _inspect(self, batch: Columns, rows: list[int], out: Columns) -> None:
        for row in rows:
            offset, size = int(batch["offset"][row]), int(batch["size"][row])
            try:
                data = self._reader.read(batch["image"][row], batch["container"][row], offset, size)
                out["sha256"][row] = hashlib.sha256(data).hexdigest()
                inspect(data)
            except Rejected as rejected:
                out["reason"][row], out["message"][row] = rejected.reason, rejected.message


@dataclass(slots=True)
class Findings:
    """Counts by source and kind, and every finding as a reject row."""

    by_source: dict[str, Counter[str]] = field(default_factory=dict)
    by_reason: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    first_seen: dict[bytes, str] = field(default_factory=dict)  # 16 bytes of the digest -> id

    def add(self, batch: dict[str, list[str]]) -> None:
        """One row an image, in any order."""
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            counts = self.by_source.setdefault(row["source"], Counter())
            counts["images"] += 1
            reason, message = row["reason"], row["message"]
            if not reason:
                twin = self.first_seen.setdefault(bytes.fromhex(row["sha256"])[:16], row["id"])
                if twin == row["id"]:
                    counts["ok"] += 1
                    continue
                reason, message = "duplicate", f"the same bytes as {twin!r}"
            counts[_kind(reason)] += 1
            self.by_reason[reason] += 1
            self.rejects.append(
                {**{k: row[k] for k in ("id", "image", "source")}, "stage": "check", "reason": reason}
                | {"message": message, "attempt": 0}
            )


def check(config: CheckConfig, runtime_env: dict[str, Any] | None = None) -> int:
    """Looks at every image, prints the table, and writes rejects/ and summary.json when --out is given."""
    if config.out is not None and config.out.exists() and any(config.out.iterdir()):
        raise UserError(f"--out {config.out} is not empty: give a new folder")
    with _manifest(config) as manifest, ray_session(config.address, runtime_env):
        quiet_data_context(no_progress_seconds=1800.0)
        ledger = RemoteLedger.start(max_reject_rate=1.0)
        step = Inspect(ImageReader(manifest.root), ledger)
        images = (
            ray.data.read_parquet(
                str(manifest.folder), columns=["id", "image", "source", "container", "offset", "size"]
            )
            .repartition(target_num_rows_per_block=_ROWS_PER_BLOCK)
            .map_batches(step.__call__, batch_size=_ROWS_PER_BLOCK, batch_format="numpy")
        )
        findings = Findings()
        with ProgressBar("checked", ledger.tally, manifest.rows, 0):
            for batch in images.iter_batches(batch_size=None, batch_format="pyarrow"):
                assert isinstance(batch, pa.Table)
                findings.add(batch.to_pydict())
    _report(config, manifest, findings)
    return EXIT_PROBLEM if config.strict and findings.rejects else 0


def _kind(reason: str) -> str:
    if reason in ("missing", "duplicate"):
        return reason
    return "oversized" if reason in _OVERSIZED else "broken"


@contextmanager
def _manifest(config: CheckConfig) -> Iterator[Manifest]:
    """The input as Parquet shards, kept only while they are read."""
    print(f"reading {config.images}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="sharegpt4v-check-") as folder:
        yield normalise(
            config.images, config.root, Path(folder), limit=config.limit, dedupe_image=config.dedupe_image
        )


def _report(config: CheckConfig, manifest: Manifest, findings: Findings) -> None:
    by_source = {source: dict(counts) for source, counts in findings.by_source.items()}
    by_reason = dict(findings.by_reason.most_common())
    print_counts(by_source, by_reason, ("images", "ok", *KINDS))
    for reject in findings.rejects[:5]:
        print(f"  {reject['id']}: {reject['message']}")
    if len(findings.rejects) > 5:
        print(
            f"  and {len(findings.rejects) - 5:,} more"
            + (f" in {config.out}/rejects" if config.out else "; --out keeps all")
        )
    if config.out is None:
        return
    (config.out / "rejects").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(findings.rejects, REJECTS), config.out / "rejects" / "part-00000.parquet"
    )
    summary = {"rows": manifest.rows, "root": manifest.root, "by_source": by_source, "by_reason": by_reason}
    write_atomic(config.out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
