"""What a service that shows metrics must offer.

``WriterSettings`` is a settings class (a frozen dataclass), whose fields have defaults. ``open`` returns a
``MetricsWriter`` for one run. All calls of a writer come from one thread of its own, which training does not wait for.
If a call fails, a note says so, and the writer gets nothing more.

A run that was killed repeats steps. A writer gets no step twice within a process; ``last_step`` says which steps the
service has from earlier processes. Metrics that it lacks are written again from ``metrics.jsonl``, so that a service
that is added later, or that could not be reached, gets the whole curve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PROJECT = "imgcap"  # where a service puts runs if the user has not said


@dataclass(frozen=True)
class Sample:
    """A validation image with its caption and its reference captions."""

    image_id: int
    file_name: str
    caption: str
    references: Sequence[str]


@dataclass(frozen=True)
class LoggedRun:
    """The run whose metrics are written.

    Attributes:
        folder: the run's folder.
        id: 16 hexadecimal digits. They stay the same when the run is resumed, and no other run has them.
        group: the name of the population that the run belongs to; "" if there is none.
        settings: the experiment, as {"decoder.hidden_size": 512}: numbers, strings, booleans, None or lists of them.
    """

    folder: Path
    id: str
    group: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name that users see."""
        return self.folder.absolute().name


class MetricsWriter(Protocol):
    """Writes the metrics of one run."""

    def last_step(self, kind: str) -> int:
        """The last step whose metrics of a kind ("train" or "validation") the service has; -1 if none or unknown."""

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes finite numbers, by name."""

    def samples(self, step: int, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> None:
        """Writes captions of validation images, and a picture of each, uint8 [h,w,3]; without pictures, none."""

    def close(self) -> None:
        """Writes what is pending."""


class WriterSettings(Protocol):
    """The settings of a service."""

    def open(self, run: LoggedRun) -> MetricsWriter:
        """Starts or continues a run."""
