"""Counters of the scheduler process, shown as Prometheus metrics by the API server.

vLLM's ``SchedulerStats`` has no room for a plugin's numbers and the two sides are different
processes. Each D manager therefore keeps a small memory-mapped file in a folder whose name
every process of one server inherits; a stat-logger plugin in the API server adds the files
up. A file is a header (magic, version) and one signed 64-bit integer per entry of
:data:`FIELDS`.
"""

from __future__ import annotations

import atexit
import dataclasses
import mmap
import os
import secrets
import shutil
import struct
import tempfile
from pathlib import Path

from echokv_vllm.scheduler.ledger import Counters

FOLDER_VARIABLE = "ECHOKV_METRICS_DIR"
FIELDS = (*(f.name for f in dataclasses.fields(Counters)), "pool_pages", "residual_pages")
_HEADER = struct.Struct("<4sI")
_BODY = struct.Struct(f"<{len(FIELDS)}q")
_MAGIC, _VERSION = b"ECHO", 1


def announce_folder() -> None:
    """Fixes the folder's name for this process and its children. Creates nothing.

    The process that chose the name removes the folder when it ends; children may be killed.
    """
    if FOLDER_VARIABLE in os.environ:
        return
    # Random, so that no file of a killed server whose pid is used again is counted.
    name = f"echokv-{os.getpid()}-{secrets.token_hex(4)}"
    folder = os.path.join(tempfile.gettempdir(), name)
    os.environ[FOLDER_VARIABLE] = folder
    atexit.register(_remove_folder, folder, os.getpid())


def _remove_folder(folder: str, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child inherits the handler
        shutil.rmtree(folder, ignore_errors=True)


class MetricsWriter:
    """One file of the scheduler process; removed when the process ends."""

    def __init__(self) -> None:
        announce_folder()
        folder = Path(os.environ[FOLDER_VARIABLE])
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".bin", prefix=f"{os.getpid()}-", dir=folder)
        self.path = Path(name)
        os.write(handle, _HEADER.pack(_MAGIC, _VERSION) + _BODY.pack(*([0] * len(FIELDS))))
        self._map = mmap.mmap(handle, _HEADER.size + _BODY.size)
        os.close(handle)
        atexit.register(_remove, self.path)

    def write(self, counters: Counters, pool_pages: int, residual_pages: int) -> None:
        """Replaces the numbers; called when a scheduler step starts and a request leaves."""
        _BODY.pack_into(self._map, _HEADER.size, *counters.values(), pool_pages, residual_pages)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    # The folder may hold files of other engines of the same server.
    if path.parent.exists() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def read_totals() -> dict[str, int]:
    """Sum of every field over the engines of this server; all 0 before one has started."""
    totals = dict.fromkeys(FIELDS, 0)
    folder = Path(os.environ.get(FOLDER_VARIABLE, ""))
    for path in sorted(folder.glob("*.bin")) if folder.name else []:
        data = path.read_bytes()
        if len(data) != _HEADER.size + _BODY.size or _HEADER.unpack_from(data) != (
            _MAGIC,
            _VERSION,
        ):
            continue
        for name, value in zip(FIELDS, _BODY.unpack_from(data, _HEADER.size), strict=True):
            totals[name] += value
    return totals
