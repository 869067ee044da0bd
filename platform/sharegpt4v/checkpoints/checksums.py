"""Checksums of `.bin` archives, compared with the bytes of each tensor when it is read."""

import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor


class Checksums:
    """The CRC-32 of every record of an archive as torch.save writes it.

    A tensor's storage is one record. It is found by length and checksum, as torch.load does not say which
    record it mapped: changed bytes match no record of the archive.
    Raises BadZipFile for another file, and for a table of tensors that does not match its checksum.
    """

    def __init__(self, archive: Path) -> None:
        with zipfile.ZipFile(archive) as records:
            kept = {(record.file_size, record.CRC) for record in records.infolist() if record.file_size}
            # All are zero after torch.serialization.set_crc32_options(False): there is nothing to compare.
            self._kept = kept if any(checksum for _, checksum in kept) else None
            for name in records.namelist():
                if self._kept and name.endswith("/data.pkl"):
                    records.read(name)  # compares; torch.load would not
        self._compared: set[int] = set()

    def match(self, tensor: Tensor) -> bool:
        """Reads the storage of a mapped tensor, once if several share it, and returns whether it is whole."""
        storage = tensor.untyped_storage()
        if self._kept is None or not storage.nbytes() or storage.data_ptr() in self._compared:
            return True
        # The mapping itself is read, in place: these pages are the ones that the tensor is written from.
        mapped = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        self._compared.add(storage.data_ptr())
        return (storage.nbytes(), zlib.crc32(mapped)) in self._kept
