"""Zip archives that hold their members as they are, as torch writes them, read where they lie."""

import struct
import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mezzotint.errors import CheckpointError

__all__ = ["StoredArchive"]

_MOST_DIRECTORY = 8 << 20  # bytes; a checkpoint of 10,000 tensors has 1 MB
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_END = struct.Struct("<4s8xL6x")
_LOCATOR_SIZE, _END_64 = 20, struct.Struct("<4s36xQ8x")


class StoredArchive:
    """The members of a zip archive, none of them compressed, and where they lie in its file.

    Attributes:
        names: Of the members.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the directory of an archive and hold it against the file.

        Args:
            path: Of the file, for messages.
            file: Open for reading, as long as the archive is in use.

        Raises:
            CheckpointError: If the archive is damaged or truncated, or a member is compressed,
                encrypted, named twice, or named like a path out of the archive.
        """
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        self._check_directory_size()
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path}: damaged archive: {error}; is it truncated?") from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            self._check(member)
            self._members[member.filename] = member
        self.names = tuple(self._members)

    def read(self, name: str, limit: int) -> bytes:
        """Return a member's content.

        Raises:
            CheckpointError: If there is none of this name, or it is longer than so many bytes.
        """
        start, size = self.locate(name)
        if size > limit:
            raise CheckpointError(
                f"{self._path}: refused: {name[:80]!r} has {size:,} bytes, more than the {limit:,}"
                " that any checkpoint needs"
            )
        return self._read(start, size)

    def locate(self, name: str) -> tuple[int, int]:
        """Return where a member's content begins in the file, and its size, in bytes.

        Raises:
            CheckpointError: If there is none of this name, or it does not lie within the file.
        """
        told = repr(name[:80])
        member = self._members.get(name)
        if member is None:
            raise CheckpointError(f"{self._path}: its archive has no member {told}")
        at = member.header_offset
        if at < 0 or at + _LOCAL_HEADER.size > self._size:
            raise CheckpointError(f"{self._path}: {told} lies beyond the end; is it truncated?")
        header = self._read(at, _LOCAL_HEADER.size)
        mark, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        named = self._read(at + _LOCAL_HEADER.size, name_length)
        start = at + _LOCAL_HEADER.size + name_length + extra_length
        if mark != b"PK\x03\x04" or named != member.orig_filename.encode():
            raise CheckpointError(f"{self._path}: {told} is not where the archive says")
        if start + member.file_size > self._size:
            raise CheckpointError(f"{self._path}: {told} ends beyond the end; is it truncated?")
        return start, member.file_size

    def _read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        return self._file.read(size)

    def _check(self, member: zipfile.ZipInfo) -> None:
        name, path = member.filename, PurePosixPath(member.filename)
        problem = None
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in member.orig_filename:
            problem = "is named like a path out of the archive"
        elif name in self._members:
            problem = "is there twice"
        elif member.flag_bits & 0x1:
            problem = "is encrypted"
        elif member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            problem = "is compressed, which torch does not do"
        if problem:
            raise CheckpointError(f"{self._path}: refused: its member {name[:80]!r} {problem}")

    def _check_directory_size(self) -> None:
        """Refuse a directory that would take much memory before it is read."""
        tail_at = max(0, self._size - (1 << 16) - _END.size)
        tail = self._read(tail_at, self._size - tail_at)
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or end + _END.size > len(tail):
            raise CheckpointError(f"{self._path}: the archive has no end; is it truncated?")
        size: int = _END.unpack_from(tail, end)[1]
        # a large archive has another record right before the one that points to it
        locator = tail_at + end - _LOCATOR_SIZE
        record = locator - _END_64.size
        if record >= 0 and self._read(locator, 4) == b"PK\x06\x07":
            mark, large = _END_64.unpack(self._read(record, _END_64.size))
            if mark == b"PK\x06\x06":
                size = large
        if size > _MOST_DIRECTORY:
            raise CheckpointError(
                f"{self._path}: refused: its directory has {size:,} bytes, more than the"
                f" {_MOST_DIRECTORY:,} that any checkpoint needs"
            )
