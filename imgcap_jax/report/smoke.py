"""What a smoke run has checked, as lines of text."""

import re
from collections.abc import Sequence

from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import counted
from imgcap_jax.experiment import Experiment
from imgcap_jax.run.extraction import uses_store


def lines(
    experiment: Experiment,
    *,
    images: int,
    validation_images: int,
    steps: int,
    losses: Sequence[float],
    decoding: Decoding,
    metrics: Sequence[str],
) -> list[str]:
    """What worked. The scores are left out: after a few steps, they are 0 or nearly so.

    Args:
        experiment: the experiment of the smoke run.
        images: the number of training images.
        validation_images: the number of validation images.
        steps: the number of steps.
        losses: the loss of the first and of the last step.
        decoding: the settings of the validations.
        metrics: the names of the scores.
    """
    first, last = losses[0], losses[-1]
    change = f"{'fell' if last < first else 'went'} from {first:.3f} to {last:.3f}"
    objective = experiment.objective.title
    scores = ", ".join(dict.fromkeys(re.sub(r"^BLEU-\d$", "BLEU", name) for name in metrics))
    rows = {
        "data": f"{counted(images, 'training image')} and {counted(validation_images, 'validation image')} were read",
        "encoder": _encoder(experiment),
        "training": f"{counted(steps, 'compiled step')} of {objective}; the loss is finite and {change}",
        "validation": f"captions were decoded ({decoding.title}) and scored with {scores}",
        "checkpoints": "were written, and restored bit for bit",
    }
    return ["checked:", *(f"  {name:12} {text}" for name, text in rows.items())]


def _encoder(experiment: Experiment) -> str:
    name = type(experiment.encoder).__name__
    if has_ready_regions(experiment.encoder):
        return f"{name}: ready-made regions were read"
    if uses_store(experiment):
        return f"{name}, frozen: its features are stored"
    return f"{name}, {'frozen' if experiment.encoder.frozen else 'trained'}: run in each step"
