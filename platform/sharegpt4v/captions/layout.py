"""The folder of a captioning run.

run.yaml      resolved configuration, fingerprint, versions, git revision
manifest/     the input, normalised to Parquet shards
work/         what is pending, and what sessions committed so far; not for readers
captions/     one part for each manifest shard, in manifest order
rejects/      likewise
put_off.jsonl images whose storage failed, where the last command had to leave some out
summary.json  report.html  _SUCCESS
"""

from pathlib import Path

from sharegpt4v.run.folder import RunFolder


class CaptionRun(RunFolder):
    """Paths of one captioning run."""

    __slots__ = ()

    @property
    def manifest(self) -> Path:
        return self.path / "manifest"

    @property
    def captions(self) -> Path:
        return self.path / "captions"

    @property
    def rejects(self) -> Path:
        return self.path / "rejects"

    @property
    def put_off(self) -> Path:
        return self.path / "put_off.jsonl"

    @property
    def pending(self) -> Path:
        return self.work / "pending"

    @property
    def outcomes(self) -> Path:
        return self.work / "outcomes"

    @property
    def sessions(self) -> Path:
        return self.work / "sessions"

    @property
    def input(self) -> Path:
        """Says what manifest/ was made of; there only where a change of that would show."""
        return self.work / "input.json"

    @property
    def retry(self) -> Path:
        return self.work / "retry.json"

    def shards(self) -> list[Path]:
        return sorted(self.manifest.glob("part-*.parquet"))
