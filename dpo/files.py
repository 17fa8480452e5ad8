"""Write files and folders so that a crash leaves the old content or the new one, never half of it."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: str | bytes | Iterable[memoryview], temporary: Path | None = None) -> None:
    """Replace the content of `path`. `temporary`, by default a hidden file beside it, is removed if that fails."""
    temporary = temporary or path.with_name(f".{path.name}-{os.getpid()}")
    content = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename a finished folder to `target`. An earlier folder of that name is removed; a file or link is set aside."""
    if target.is_symlink() or target.is_file():
        set_aside(target)
    old = target.with_name(f".{target.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename to abandoned-<name>, over an earlier one. A link is renamed itself: it may lead to another run."""
    aside = path.with_name(f"abandoned-{path.name}")
    if aside.is_symlink() or aside.is_file():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def atomic_link(link: Path, name: str) -> None:
    """Make `link` a symbolic link to `name`, in place of an earlier link."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)
    sync(link.parent)


class Lines:
    """A file that lines are added to. What a full disk does not take waits in memory for the next line."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""

    def add(self, line: str) -> bool:
        """Add a line. Return whether all lines are written."""
        self._waiting += line.encode("utf-8", "replace") + b"\n"
        return self.flush()

    def flush(self) -> bool:
        """Write the lines that wait. Return whether all are written."""
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        return not self._waiting

    def size(self) -> int:
        """Write everything to disk and return the file's bytes. Raise OSError if the disk refuses."""
        if not self.flush():
            raise OSError(errno.ENOSPC, "lines wait for space on the disk")
        os.fsync(self._file)
        return os.fstat(self._file).st_size

    def close(self) -> None:
        self.flush()
        os.close(self._file)
