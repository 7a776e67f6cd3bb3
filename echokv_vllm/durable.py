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


def write_folder(target: Path, files: Mapping[str, bytes], what: str) -> None:
    """Write a sibling folder completely, then rename it into place.

    Args:
        target: The folder; one that is there is replaced.
        files: Contents by name.
        what: What the folder is, for the message of an error.

    Raises:
        OSError: If anything could not be written; what was there before is still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling is on the same file system, so that the renames are atomic.
    suffix = uuid.uuid4().hex[:8]
    fresh = target.with_name(f".{target.name}.new-{suffix}")
    old = target.with_name(f".{target.name}.old-{suffix}")
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
