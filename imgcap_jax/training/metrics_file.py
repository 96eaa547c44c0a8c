"""``metrics.jsonl``, the metrics of a run: one JSON object per line. It imports neither JAX nor NumPy."""

import json
import math
from pathlib import Path
from typing import Any

from imgcap_jax.files import reading

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without the incomplete one that a killed run leaves; none if there is no file.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / METRICS
    if not path.is_file():
        return []
    with reading(path, "move it away"):
        text = path.read_text(encoding="utf-8", errors="replace")
    records = (parse_line(line) for line in text.split("\n"))
    return [record for record in records if math.isfinite(record["step"])]


def parse_line(line: str | bytes) -> dict[str, Any]:
    """The values of a line, whose step is an integer. Of a line that cannot be read, only an infinite step.

    A killed run leaves an incomplete line.
    """
    try:
        record = json.loads(line)
        return {**record, "step": int(record["step"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {"step": math.inf}
