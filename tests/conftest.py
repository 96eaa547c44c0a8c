"""Fixtures that every part uses."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; a machine without it skips the tests that read it."""
    folder = Path(os.environ.get("IMGCAP_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set IMGCAP_SHARED to the folder that holds data/)")
    return folder
