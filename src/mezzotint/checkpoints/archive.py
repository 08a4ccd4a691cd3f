"""Zip archives that hold their members as they are, as torch writes them, read where they lie."""

import mmap
import struct
import zipfile
from pathlib import Path, PurePosixPath

from mezzotint.errors import CheckpointError

__all__ = ["StoredArchive"]

_MOST_DIRECTORY = 16 << 20  # bytes; a checkpoint of 10,000 tensors has 1 MB
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_END = struct.Struct("<4s6xHLLH")
_END_64_LOCATOR, _END_64 = struct.Struct("<4s4xQ4x"), struct.Struct("<4s36xQQ")


class StoredArchive:
    """The members of a zip archive, none of them compressed, and where they lie in its file.

    Attributes:
        names: Of the members.
    """

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        """Read the directory of an archive and hold it against the file.

        Args:
            path: Of the file, for messages.
            mapped: The file.

        Raises:
            CheckpointError: If the archive is damaged or truncated, or a member is compressed,
                encrypted, named twice, or named like a path out of the archive.
        """
        self._path, self._mapped = path, mapped
        self._check_directory_size()
        try:
            with zipfile.ZipFile(path) as archive:
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
                f"{self._path}: refused: {name} has {size:,} bytes, more than the {limit:,} that"
                " any checkpoint needs"
            )
        return self._mapped[start : start + size]

    def locate(self, name: str) -> tuple[int, int]:
        """Return where a member's content begins in the file, and its size, in bytes.

        Raises:
            CheckpointError: If there is none of this name, or it does not lie within the file.
        """
        member = self._members.get(name)
        if member is None:
            raise CheckpointError(f"{self._path}: its archive has no member {name!r}")
        at = member.header_offset
        if at + _LOCAL_HEADER.size > len(self._mapped):
            raise CheckpointError(f"{self._path}: {name} lies beyond the end; is it truncated?")
        mark, name_length, extra_length = _LOCAL_HEADER.unpack_from(self._mapped, at)
        start = at + _LOCAL_HEADER.size + name_length + extra_length
        named = self._mapped[at + _LOCAL_HEADER.size : at + _LOCAL_HEADER.size + name_length]
        if mark != b"PK\x03\x04" or named != member.orig_filename.encode():
            raise CheckpointError(f"{self._path}: {name} is not where the archive says")
        if start + member.file_size > len(self._mapped):
            raise CheckpointError(f"{self._path}: {name} ends beyond the end; is it truncated?")
        return start, member.file_size

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
            raise CheckpointError(f"{self._path}: refused: its member {name!r} {problem}")

    def _check_directory_size(self) -> None:
        """Refuse a directory that would take much memory before it is read."""
        end = self._mapped.rfind(b"PK\x05\x06", max(0, len(self._mapped) - (1 << 16) - _END.size))
        if end < 0 or end + _END.size > len(self._mapped):
            raise CheckpointError(f"{self._path}: the archive has no end; is it truncated?")
        _, _, size, _, _ = _END.unpack_from(self._mapped, end)
        locator = end - _END_64_LOCATOR.size
        if locator >= 0 and self._mapped[locator : locator + 4] == b"PK\x06\x07":
            _, at = _END_64_LOCATOR.unpack_from(self._mapped, locator)
            if at + _END_64.size <= len(self._mapped):
                size = max(
                    size if size != 0xFFFFFFFF else 0, _END_64.unpack_from(self._mapped, at)[1]
                )
        if size > _MOST_DIRECTORY and size != 0xFFFFFFFF:
            raise CheckpointError(
                f"{self._path}: refused: its directory has {size:,} bytes, more than the"
                f" {_MOST_DIRECTORY:,} that any checkpoint needs"
            )
