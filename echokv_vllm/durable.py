"""Files that outlast a crash, and folders that are complete or absent, also on a full disk."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, payload: bytes) -> None:
    """Write a file; on return its bytes are on the disk."""
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def try_folder(target: Path, what: str) -> None:
    """Find out before long work whether `write_folder` can write and rename at `target`.

    Writes a sibling folder and renames it, then renames what is at `target` away and back; on
    return everything is as it was. If the process is killed in between, what was at `target` is
    beside it, `.NAME.old-*`.

    Args:
        target: The folder to be; not a symbolic link. Its parents need not exist.
        what: What the folder will be, for the message of an error.

    Raises:
        OSError: If the file system refuses.
    """
    # Parents that are absent are not made: nothing may be left behind if a later check fails.
    home = next(parent for parent in target.parents if parent.exists())
    fresh, old = _siblings(home / target.name)
    renamed = fresh.with_name(f"{fresh.name}-renamed")
    try:
        fresh.mkdir()
        write_file(fresh / "trial", b"trial")
        # Some file systems over object stores write files but cannot rename folders.
        fresh.rename(renamed)
        if target.exists():
            target.rename(old)
            old.rename(target)
    except OSError as error:
        left = f"; what was there is now {str(old)!r}" if old.exists() else ""
        raise OSError(
            error.errno,
            f"{error.strerror}; {what} could not be put there in the end, so nothing was "
            f"started{left}; name a folder whose parent can be written to and which can be renamed",
            str(target),
        ) from error
    finally:
        for trial in (fresh, renamed):
            shutil.rmtree(trial, ignore_errors=True)


def write_folder(target: Path, files: Mapping[str, bytes], what: str) -> None:
    """Write a sibling folder completely, then rename it into place.

    Args:
        target: The folder, not a symbolic link; one that is there is replaced.
        files: Contents by name.
        what: What the folder is, for the message of an error.

    Raises:
        OSError: If anything could not be written; what was there before is still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = _siblings(target)
    fresh.mkdir()
    try:
        for name, payload in files.items():
            write_file(fresh / name, payload)
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}; {what} was not written and nothing was left behind",
            str(target),
        ) from error
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
    # The new one is in place: what cannot be deleted of the old one is no failure to save.
    shutil.rmtree(old, ignore_errors=True)


def _siblings(target: Path) -> tuple[Path, Path]:
    """Names for the new and the old folder; on one file system, so that renames are atomic."""
    suffix = uuid.uuid4().hex[:8]
    return (
        target.with_name(f".{target.name}.new-{suffix}"),
        target.with_name(f".{target.name}.old-{suffix}"),
    )
