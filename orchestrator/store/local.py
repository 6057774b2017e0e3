"""A store in a directory.

Invariant: a file outside the hidden folder of unfinished writes is a whole, durable object. Data goes
to a file in that folder and is flushed to disk; then a hard link (`create`, which fails when the name is
taken) or a rename (`put`) gives it its name in one step, and the name's folder is flushed. A writer killed
at any moment leaves at most an unfinished file, which is no object and which `check` removes after a day.

Folders are walked one descriptor at a time without following symbolic links, so a link planted inside
the store leads nowhere. The store's own root may be a link: that is the user's choice.

Not covered: file systems without hard links (`check` says so), or whose `fsync` lies.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path

from fimo.orchestrator.store.base import Entry, NotFound, check_store, is_key, short, validate_key, validate_prefix
from fimo.workers.errors import StoreError

UNFINISHED = ".fimo-unfinished"
"""The folder of unfinished writes, directly under the store. No key can lead into it."""

STALE_AFTER_S = 24 * 3600.0
"""An unfinished file this old has lost its writer: no write takes a day."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class LocalStore:
    """See `fimo.orchestrator.store.base.Store`. The directory is created by the first write."""

    uri: str
    root: Path = field(repr=False)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`. Raises `StoreError` when the disk is full, read-only or not ours."""
        with self._writing(key, data) as (unfinished, temporary, folder):
            try:
                os.link(temporary, _name(key), src_dir_fd=unfinished, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                # Flush before answering False, which promises a durable object: the winner may not have done so yet.
                os.fsync(folder)
                return False
            os.fsync(folder)
            return True

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`."""
        with self._writing(key, data) as (unfinished, temporary, folder):
            os.replace(temporary, _name(key), src_dir_fd=unfinished, dst_dir_fd=folder)
            os.fsync(folder)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        validate_key(key)
        try:
            with self._folder_of(key) as folder:
                file = os.open(_name(key), _READ, dir_fd=folder)
                with open(file, "rb") as opened:
                    if not stat.S_ISREG(os.fstat(file).st_mode):
                        raise NotFound(f"store {self.uri} has no object {short(key)}")
                    return opened.read()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise NotFound(f"store {self.uri} has no object {short(key)}") from None
            raise self._failure("read", key, error) from error

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`."""
        validate_prefix(prefix)
        base = prefix.rpartition("/")[0]
        try:
            with self._folder(base) as folder:
                entries = [
                    Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
                    for key, status in _files(folder, base)
                    if key.startswith(prefix) and is_key(key)
                ]
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return iter(())
            raise self._failure("list", prefix, error) from error
        # By the key alone, which no two have: entries compare slowly.
        return iter(sorted(entries, key=attrgetter("key")))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        validate_key(key)
        try:
            with self._folder_of(key) as folder:
                os.unlink(_name(key), dir_fd=folder)
                os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise self._failure("remove", key, error) from error

    def remove_empty(self, path: str) -> None:
        """Remove the folder of keys that start with `path/`, and those in it, if no file is left in them.

        Not while something may write there: a writer whose folder goes away fails.
        """
        validate_key(path)
        parent, _, name = path.rpartition("/")
        try:
            with self._folder(parent) as folder:
                for _, _, _, inside in os.fwalk(name, topdown=False, dir_fd=folder, follow_symlinks=False):
                    for child in os.listdir(inside):
                        with contextlib.suppress(OSError):
                            os.rmdir(child, dir_fd=inside)
                os.rmdir(name, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY):
                raise self._failure("remove", path, error) from error

    def check(self) -> None:
        """See `Store.check`. Also removes unfinished files whose writer was killed over a day ago."""
        check_store(self)
        try:
            with self._folder(UNFINISHED) as folder:
                _remove_stale(folder)
        except OSError as error:
            raise self._failure("clean", "", error) from error

    @contextlib.contextmanager
    def _writing(self, key: str, data: bytes) -> Iterator[tuple[int, str, int]]:
        """A flushed file without a key yet: its folder's descriptor, its name, the key's folder's descriptor."""
        validate_key(key)
        temporary = uuid.uuid4().hex
        try:
            with self._folder(UNFINISHED, make=True) as unfinished, self._folder_of(key, make=True) as folder:
                try:
                    with open(os.open(temporary, _WRITE, 0o666, dir_fd=unfinished), "wb", buffering=0) as file:
                        _write_all(file.fileno(), data)
                        os.fsync(file.fileno())
                    yield unfinished, temporary, folder
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=unfinished)
        except OSError as error:
            raise self._failure("write", key, error) from error

    def _folder_of(self, key: str, make: bool = False) -> contextlib.AbstractContextManager[int]:
        return self._folder(key.rpartition("/")[0], make)

    @contextlib.contextmanager
    def _folder(self, path: str, make: bool = False) -> Iterator[int]:
        """A descriptor of the store's folder `path` ("" = the root), reached without following links."""
        if make:
            _make_durably(self.root)
        folder = os.open(self.root, _FOLDER & ~os.O_NOFOLLOW)
        try:
            for segment in path.split("/") if path else ():
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(segment, dir_fd=folder)
                        os.fsync(folder)
                inner = os.open(segment, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def _failure(self, verb: str, key: str, error: OSError) -> StoreError:
        where = f"store {self.uri}: cannot {verb} {short(key)}" if key else f"store {self.uri}: cannot {verb} it"
        return StoreError(f"{where}: {_MENDS.get(error.errno or 0, os.strerror(error.errno or errno.EIO))}")


_NO_LINKS = "its file system has no hard links, which writing each result once needs; use another directory or S3"
_MENDS = {
    errno.ENOSPC: "the disk is full; free some space and resume",
    errno.EDQUOT: "the disk quota is used up; free some space and resume",
    errno.EFBIG: "the file-size limit (ulimit -f) is too low; raise it and resume",
    errno.EACCES: "permission denied; make the directory writable for this user or choose another --store",
    errno.EROFS: "the file system is read-only; choose another --store",
    errno.ENOTDIR: "a file or link stands where the store needs a folder; move it or choose another --store",
    errno.EISDIR: "a folder stands where the store needs a file; move it away or choose another --store",
    errno.ELOOP: "a symbolic link stands inside the store; remove it",
    errno.EMLINK: "a symbolic link stands inside the store; remove it",
    errno.EPERM: f"not permitted, or {_NO_LINKS}",
    errno.ENOTSUP: _NO_LINKS,
    errno.ENOSYS: _NO_LINKS,
    errno.ENAMETOOLONG: "the path is too long for the file system; choose a shorter --store",
    errno.EXDEV: "a folder inside the store is on another file system; unmount it or choose another --store",
    errno.EMFILE: "too many open files; raise ulimit -n",
    errno.EIO: "the disk reports an error (EIO); check it before resuming",
}


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _write_all(file: int, data: bytes) -> None:
    # Write on until nothing is left: one write() takes at most 2 GiB on Linux, and stops short when the disk fills up.
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _make_durably(folder: Path) -> None:
    """`mkdir -p`, each new folder's parent flushed so that the folder outlives a power cut."""
    if folder.is_dir():
        return
    _make_durably(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _raise(error: OSError) -> None:
    if error.errno != errno.ENOENT:
        raise error


def _files(folder: int, base: str) -> Iterator[tuple[str, os.stat_result]]:
    """Every regular file below an open folder: what would be its key, and its status."""
    for path, _, names, inside in os.fwalk(".", dir_fd=folder, follow_symlinks=False, onerror=_raise):
        within = "".join(f"{part}/" for part in (base, path.removeprefix(".").strip("/")) if part)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=inside, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield f"{within}{name}", status


def _remove_stale(folder: int) -> None:
    oldest = time.time() - STALE_AFTER_S
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < oldest:
                os.unlink(name, dir_fd=folder)
