"""Fixtures for the tests of studies."""

from dataclasses import replace
from pathlib import Path

import pytest

from imgcap_jax.cli.experiments import find
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.study import Factor, Study


@pytest.fixture(scope="session")
def study(tiny_file: Path, tiny_data: Path) -> Study:
    """Three settings with two seeds, in four runs that can be trained and two whose loss becomes infinite."""
    tiny = find(str(tiny_file))
    base: Experiment = replace(
        tiny,
        data=replace(tiny.data, data_dir=tiny_data),
        decoder=ShowTell(hidden_size=8, embedding_size=8, dropout=0.3),
        training=replace(tiny.training, epochs=1.0, checkpoint_minutes=5.0),
    )
    factors = (
        Factor("size", {"12": {"decoder.hidden_size": 12}}),
        Factor("rate", {"infinite": {"optimizer.learning_rate": 1e38}}),
        Factor("beam", {"1": {"decoding.beam": 1}}),
    )
    return Study(base, factors, seeds=(0, 1), scores=("CIDEr-D", "true", "BLEU-4"))
