"""Every member of a tar file, whatever shape the file is in: none is lost without a word."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.locate import is_text

_BLOCK = tarfile.BLOCKSIZE
_SCANNED = 1 << 16  # bytes read at a time behind the end of an archive

_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
    b"\x1f\x9d": "uncompress",
}
"""First bytes of compressed files, and what unpacks them."""

_PASSED_OVER = {
    tarfile.LNKTYPE: "hard links in archives",
    tarfile.SYMTYPE: "symbolic links in archives",
    tarfile.CHRTYPE: "devices or pipes in archives",
    tarfile.BLKTYPE: "devices or pipes in archives",
    tarfile.FIFOTYPE: "devices or pipes in archives",
}


def plain_members(
    file: IO[bytes], name: str, ignored: Counter[str]
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the plain visible files of all archives in one file, in order; only headers are read.

    Links, devices, hidden files and names that are not UTF-8 are counted in `ignored`; folders are not.
    Raises UserError for a file that is compressed, cut or damaged: tarfile takes a zeroed or broken header,
    or the end of a file, for the end of an archive, and what comes behind it would be missing in silence.
    """
    for tar, member in _members(file, name):
        if member.isdir():
            continue
        if not member.isreg():
            ignored[_PASSED_OVER.get(member.type, "members of an unknown type in archives")] += 1
        elif not is_text(member.name):
            ignored["names in archives that are not UTF-8"] += 1
        elif _is_hidden(member.name):
            ignored["hidden files in archives"] += 1
        else:
            yield tar, member


def _members(file: IO[bytes], name: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    start = file.read(8)
    for magic, unpacker in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{name} is compressed, so images in it cannot be found by range: {unpacker} it first"
            )
    begin: int | None = 0
    while begin is not None:
        file.seek(begin)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # left open: sidecars are read when their key ends
            while (member := tar.next()) is not None:
                if tar.offset <= member.offset:  # a negative size would lead back, again and again
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                yield tar, member
                vars(tar)["members"].clear()  # tarfile would keep every header: 1 KB a member
        # Hostile headers make tarfile raise all of these; a name of 8 GB is one.
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{name} is not a whole tar file ({reason}): copy or download it again"
            ) from error
        begin = _next_archive(file, tar.offset, name)


def _next_archive(file: IO[bytes], end: int, name: str) -> int | None:
    """Returns where the next archive of the file begins; None where there is nothing but zeros.

    end: where tarfile saw an archive end. Raises UserError where it does not end as an archive must.
    """
    file.seek(end)
    block = file.read(_BLOCK)
    if not block:
        raise UserError(
            f"{name} is cut: it ends at byte {end} without the zero blocks that end an archive; copy or "
            "download it again, or, if its writer left them out, append 1024 zero bytes"
        )
    if block.strip(b"\0"):
        what = "is cut inside a header" if len(block) < _BLOCK else "is damaged"
        raise UserError(f"{name} {what} at byte {end}: copy or download it again")
    at = end + len(block)
    while chunk := file.read(_SCANNED):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            begin = at + zeros - (at + zeros - end) % _BLOCK
            if begin < end + 2 * _BLOCK:  # an archive ends with two zero blocks: this one was a header
                raise UserError(f"{name} is damaged at byte {end}: copy or download it again")
            _require_header(file, begin, name)
            return begin
        at += len(chunk)
    return None


def _require_header(file: IO[bytes], begin: int, name: str) -> None:
    """Raises UserError where no archive begins; tarfile would call that an empty one."""
    file.seek(begin)
    try:
        tarfile.TarInfo.frombuf(file.read(_BLOCK), tarfile.ENCODING, "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(
            f"{name} is damaged at byte {begin}: neither zeros nor another archive follow its end; copy or "
            "download it again"
        ) from error


def _is_hidden(member: str) -> bool:
    """Returns whether a part of the path starts with a dot, other than `.` and `..` themselves."""
    return any(part.startswith(".") and part not in (".", "..") for part in member.split("/"))
