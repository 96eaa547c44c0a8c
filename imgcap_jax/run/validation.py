"""The validations of a run in training, which choose its best parameters."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from imgcap_jax.data.images import Resize
from imgcap_jax.data.sources import CaptionExample, CaptionSource
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import counted
from imgcap_jax.models.model import Frozen
from imgcap_jax.run.evaluation import Captioned, SplitEvaluator, naming_run, spread
from imgcap_jax.run.members import Example
from imgcap_jax.terminal import Say
from imgcap_jax.training.checkpoints import Checkpoints, Progress
from imgcap_jax.training.log import MetricsLog, Sample
from imgcap_jax.training.signals import Stopped, StopRequest
from imgcap_jax.training.step import TrainState

_SAMPLES = 5  # validation images whose captions are logged


class Draw(Protocol):
    """Draws an image with its caption."""

    def __call__(
        self,
        example: CaptionExample,
        resize: Resize,
        caption: str,
        words: tuple[str, ...],
        attention: np.ndarray | None,
    ) -> np.ndarray:
        """The picture, uint8 [h,w,3].

        Args:
            example: the image.
            resize: how the model resizes it.
            caption: its caption.
            words: the words of the caption.
            attention: float32 [words,N], the attention of each word; None if it is not known.
        """


@dataclass
class Validation:
    """Decodes and scores the validation split, and saves the parameters if they are the best (see ``select``).

    Attributes:
        evaluator: of the validation split. frozen: the variables that are not trained.
        all_images: the number of images of the whole split, of which the evaluator can have a part.
        search: the decoding settings.
        checkpoints, log: where parameters and scores go. show: receives the lines for the user.
        judged: whether scores and defects of captions are shown. Those of a smoke run mean nothing.
        folder: the run's folder.
        stop: what can interrupt it.
        draw: draws the logged samples; None: their captions are logged without pictures.
        attends: whether pictures show the attention, which costs a program that is compiled once.
        resize: how the model resizes images.
        metrics: the names of the scores; empty before the first validation.
        interrupted: the signal that has interrupted it, or 0.
    """

    evaluator: SplitEvaluator
    frozen: Frozen
    all_images: int
    search: Decoding
    checkpoints: Checkpoints
    log: MetricsLog
    show: Say
    judged: bool
    folder: Path
    stop: StopRequest
    draw: Draw | None = None
    attends: bool = False
    resize: Resize = "squash"

    def __post_init__(self) -> None:
        self.metrics: list[str] = []
        self.interrupted = 0
        self._ids = list(self.evaluator.references)
        self._sampled = spread(len(self._ids), _SAMPLES)
        self._advice: list[str] = []
        self._shown: set[str] = set()  # notes about the references, which would repeat at each validation

    def __call__(self, state: TrainState, progress: Progress) -> Progress:
        """Validates the state after ``progress.step`` steps, of which there is a checkpoint.

        Returns:
            The progress with the result, which is saved. If it is interrupted, the progress with its validation due.
        """
        evaluator, params = self.evaluator, state.best_guess
        try:
            with self.stop.repeatable(progress.step):
                captioned = evaluator.caption([params], [self.frozen], self.search)
                degeneration, warnings = evaluator.degeneration(captioned)
                scored = evaluator.score(captioned.captions)
                teacher_forced = evaluator.teacher_forced(params, self.frozen)
                examples: tuple[Example, ...] = ()
                if self.draw is not None and self.attends:
                    examples = evaluator.examples([params], [self.frozen], captioned, _SAMPLES)
        except Stopped as stopped:
            self.interrupted = stopped.number
            return replace(progress, validation_due=True)
        scores = {**scored.values, **teacher_forced, **asdict(degeneration)}
        progress, note = select(replace(progress, validation_due=False), scores)
        self._advice = naming_run(warnings, self.folder)
        if progress.best_step == progress.step:
            self.checkpoints.save_best(progress.step, params)
        self.metrics = list(scored.values)
        self.log.write("validation", progress.step, {**scores, "images_per_second": captioned.images_per_second})
        samples = [self._sample(self._ids[number], captioned) for number in self._sampled]
        self.log.write_samples(progress.step, samples, self._drawing(samples, examples))
        self.checkpoints.save_validated(replace(progress, seconds=self.log.seconds))
        if not self.judged:
            count = counted(len(captioned.captions), "image")
            self.show(f"validation at step {progress.step}: {count} decoded and scored")
            return progress
        images = counted(len(captioned.captions), "image")
        if len(captioned.captions) < self.all_images:
            images = f"{len(captioned.captions):,} of {self.all_images:,} images"
        self.show(_validation_line(progress, scores, captioned, f"{images}, {self.search.title}"))
        if summary := evaluator.degeneration_summary(degeneration):
            self.show(f"  {summary}")
        for line in dict.fromkeys([*scored.warnings, *note]):
            if line not in self._shown:
                self.show(f"  note: {line}")
                self._shown.add(line)
        return progress

    def advise(self) -> None:
        """Shows what prevents the defects of the captions of the last validation."""
        for line in self._advice if self.judged else ():
            self.show(f"  note: {line}")

    def _drawing(self, samples: list[Sample], examples: tuple[Example, ...]) -> partial[list[np.ndarray]] | None:
        """What draws the samples, without the parameters, which the next step replaces."""
        if self.draw is None:
            return None
        shown = examples or tuple(Example(number, (), None) for number in self._sampled)
        return partial(_pictures, self.draw, self.evaluator.source, self.resize, samples, shown)

    def _sample(self, image_id: int, captioned: Captioned) -> Sample:
        evaluator = self.evaluator
        return Sample(
            image_id, evaluator.file_names[image_id], captioned.captions[image_id], evaluator.references[image_id]
        )


def _pictures(
    draw: Draw, source: CaptionSource, resize: Resize, samples: list[Sample], examples: tuple[Example, ...]
) -> list[np.ndarray]:
    return [
        draw(source[example.number], resize, sample.caption, example.words, example.attention)
        for sample, example in zip(samples, examples, strict=True)
    ]


def select(progress: Progress, scores: Mapping[str, float]) -> tuple[Progress, list[str]]:
    """The progress after a validation, and a line that explains the choice if CIDEr-D did not decide.

    If CIDEr-D is equal, BLEU-4 decides, then the teacher-forced loss, and then the later parameters are the best: on
    few images CIDEr-D can be 0 for every caption, and the first validation would remain the best forever.
    """
    # BLEU-4 of captions without a common 4-gram is not exactly 0 in the official tools, but about 1e-13.
    cider, ties = scores["CIDEr-D"], (round(scores["BLEU-4"], 6), -scores["teacher_forced_loss"])
    best = progress.best, progress.best_ties
    if progress.best is None or (cider, ties) >= best:
        better = progress.best is None or (cider, ties) > best
        note = []
        if progress.best is not None and cider == progress.best:
            before = progress.best_ties or ties
            why = "BLEU-4 is higher" if ties[0] > before[0] else "the teacher-forced loss is lower"
            if ties[0] == before[0] and ties[1] <= before[1]:
                why = "the later parameters are kept"
            note = [f"CIDEr-D equals that of the best parameters so far; {why}"]
        misses = 0 if better else progress.misses + 1
        return replace(progress, best=cider, best_step=progress.step, best_ties=ties, misses=misses), note
    note = [
        f"CIDEr-D equals that of the best parameters, of step {progress.best_step}, which are better in BLEU-4 or loss"
    ]
    return replace(progress, misses=progress.misses + 1), note if cider == progress.best else []


def without_best(state: TrainState, progress: Progress, validate: Validation) -> Progress:
    """The progress of a run of which the best parameters are lost, or were moved away because they are damaged.

    The present parameters are validated. They are the best ones, unless older best parameters with a higher CIDEr-D
    are left.
    """
    checkpoints, step = validate.checkpoints, validate.checkpoints.best_step
    if progress.best_step is None or (step is not None and step > progress.best_step):
        return progress  # killed between saving the best parameters and the next checkpoint
    validate.show(f"note: the best parameters, of step {progress.best_step}, are not in {checkpoints.folder / 'best'}")
    older = None if step is None else validate.log.validation(step)
    best = None if older is None else older.get("CIDEr-D")
    progress = replace(progress, best=best, best_step=None if best is None else step, best_ties=(), misses=0)
    return validate(state, progress)


def _validation_line(progress: Progress, scores: Mapping[str, float], captioned: Captioned, how: str) -> str:
    best = "best so far" if progress.best_step == progress.step else f"best {100 * (progress.best or 0):.1f}"
    return (
        f"validation at step {progress.step} ({how}): CIDEr-D {100 * scores['CIDEr-D']:.1f} ({best})  "
        f"BLEU-4 {100 * scores['BLEU-4']:.1f}  teacher-forced perplexity "
        f"{scores['teacher_forced_perplexity']:.2f}  {captioned.images_per_second:.0f} images/s"
    )
