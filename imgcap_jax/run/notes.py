"""What a user should know before hours of training: options without effect, and captions that settings do not fit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from imgcap_jax.data.caption_checks import CaptionCounts, vocabulary_notes
from imgcap_jax.data.caption_tokens import CaptionTokens
from imgcap_jax.data.images import SIDE_WORDS
from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.data.sources import CaptionSource
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.contract import has_attention
from imgcap_jax.run.extraction import uses_store
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.objective import Objective
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical


def check_together(experiment: Experiment) -> None:
    """Raises UserError if a part of the objective would have no effect on the decoder."""
    objective = experiment.objective
    if (
        isinstance(objective, CrossEntropy)
        and objective.attention_penalty
        and not has_attention(experiment.decoder, experiment.encoder.region_size)
    ):
        raise UserError(
            f"objective.attention_penalty has no effect on {type(experiment.decoder).__name__}, which has no "
            f"attention; set it to 0, or use another decoder"
        )


def check_objective(objective: Objective, vocabulary: Vocabulary) -> None:
    """Raises UserError if a part of the objective would have no effect with the vocabulary."""
    if isinstance(objective, SelfCritical):
        objective.function_words(vocabulary)


def starting_notes(
    experiment: Experiment, sources: Sequence[CaptionSource], validation: CaptionSource, vocabulary: Vocabulary
) -> list[str]:
    """The notes on a new run, one line each.

    Args:
        experiment: what is trained.
        sources: the training split of each dataset.
        validation: the validation split.
        vocabulary: the words of the model.
    """
    data = experiment.data
    training, theirs = (
        CaptionCounts.of([CaptionTokens.of(source, vocabulary.tokenizer) for source in split], vocabulary)
        for split in (sources, [validation])
    )
    notes = [*without_effect(experiment), *vocabulary_notes(training, theirs, vocabulary, data.min_count)]
    cut = training.share_longer(data.max_words)
    if cut and not isinstance(experiment.objective, SelfCritical):  # whose references are not cut
        notes.append(
            f"{100 * cut:.1f} % of the training captions have more than {data.max_words} words and are cut there, "
            f"without an end; a larger --data.max-words keeps them whole"
        )
    mirrors = data.augmentation.flip and not has_ready_regions(experiment.encoder)
    if mirrors and data.augmentation.side_words == SIDE_WORDS and not training.english:
        notes.append(
            "images are mirrored unless a caption says left or right, but the captions do not seem to be English; set "
            "--data.augmentation.side-words to their words (docs/training.md has a list), or "
            "--data.augmentation.flip false"
        )
    return notes


def without_effect(experiment: Experiment) -> list[str]:
    """One line per option that differs from its default and has no effect in this combination."""
    data, optimizer, decoder = experiment.data, experiment.optimizer, experiment.decoder
    ready, trained = has_ready_regions(experiment.encoder), not experiment.encoder.frozen
    found: list[tuple[str, Any, Sequence[str], str]] = []
    if ready:
        unread = ["augmentation", "image_size", "resize", "feature_dtype"]
        found.append(("data", data, unread, "ready-made regions"))
    elif trained:
        found.append(("data", data, ["views", "feature_dtype"], "an encoder that is trained"))
    elif not uses_store(experiment):
        found.append(("data", data, ["feature_dtype"], "views 1 and augmentation, for which no features are stored"))
    if (ready or not trained) and isinstance(optimizer, Optimizer):
        found.append(("optimizer", optimizer, ["encoder_factor", "encoder_start_epochs"], "an encoder that is frozen"))
    if isinstance(experiment.objective, SelfCritical):
        reason = "self-critical training, except on the teacher-forced loss of validations"
        found.append(("data", data, ["captions_per_image"], reason))
    if not data.augmentation.flip:
        found.append(("data.augmentation", data.augmentation, ["side_words"], "flip false"))
    if isinstance(optimizer, Optimizer):
        if optimizer.schedule != "step":
            found.append(
                ("optimizer", optimizer, ["decay_every_epochs", "decay_factor"], f"schedule {optimizer.schedule}")
            )
        if optimizer.schedule != "cosine":
            found.append(("optimizer", optimizer, ["final_fraction"], f"schedule {optimizer.schedule}"))
        if optimizer.algorithm != "adamw" and optimizer.weight_decay:
            found.append(("optimizer", optimizer, ["weight_decay"], f"algorithm {optimizer.algorithm}"))
        if optimizer.algorithm == "sgd":
            found.append(("optimizer", optimizer, ["b1", "b2"], f"algorithm {optimizer.algorithm}"))
    if not getattr(decoder, "dropout", 1.0) and hasattr(decoder, "variational_dropout"):
        found.append(("decoder", decoder, ["variational_dropout"], "dropout 0"))
    return [
        f"{part}.{name} has no effect with {reason}"
        for part, settings, names, reason in found
        for name in names
        if getattr(settings, name) != _default(settings, name)
    ]


def _default(settings: Any, name: str) -> Any:
    (item,) = (item for item in dataclasses.fields(settings) if item.name == name)
    if item.default is not dataclasses.MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else None
