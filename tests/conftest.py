"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest

# Triton reads it when it is imported, which other tests do too: without a GPU its kernels run in
# the interpreter. Device files, not torch.cuda: most runs need no torch here.
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of the shared material (reference model, corpora).

    It is not part of the repository: ``ECHOKV_SHARED`` names it, or it lies beside the clone as
    ``../shared``. Tests that need it are skipped where it is absent.
    """
    named = os.environ.get("ECHOKV_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        if named:
            pytest.fail(f"ECHOKV_SHARED={named}: no such folder; unset it or correct it")
        pytest.skip("no shared material: set ECHOKV_SHARED to its folder")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked ``gpu`` on a machine without one, so that plain ``pytest`` works."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # not at the top: most runs select no such test

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
