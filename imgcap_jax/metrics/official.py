"""Where the official COCO tools lie, if they are installed; nothing of them is imported."""

import importlib.util
from pathlib import Path


def official_folder(part: str) -> Path | None:
    """Folder of a part of the package `pycocoevalcap` ("meteor", "spice", ...); None where it is not installed."""
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / part
