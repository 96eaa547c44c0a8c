"""Fixtures for the tests of training."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from imgcap_jax.cli.experiments import find
from imgcap_jax.experiment import Experiment


@pytest.fixture(scope="session")
def tiny(tiny_file: Path, tiny_data: Path) -> Experiment:
    """The tiny experiment with its data folder."""
    experiment = find(str(tiny_file))
    return replace(experiment, data=replace(experiment.data, data_dir=tiny_data))


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The list of tracing and compilation events during a test."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "compile" in event or "trace" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)
