"""Locates the official COCO tools, if they are installed, without importing them."""

import importlib.util
from pathlib import Path


def official_folder(part: str) -> Path | None:
    """Folder of a part ("meteor", "spice", ...) of the package `pycocoevalcap`; None if it is not installed."""
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / part
