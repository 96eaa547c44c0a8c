"""A run that is opened for training: its data, model, objective, checkpoints and log. ``train.py`` has the loop."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from imgcap_jax.data.caption_tokens import CaptionTokens, total_counts
from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.mixtures import describe_mixture, rows_per_epoch
from imgcap_jax.data.pipeline import train_batches
from imgcap_jax.data.regions import RegionSource, has_ready_regions
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, differences, settings_of, signature
from imgcap_jax.models.decoders.contract import check_length
from imgcap_jax.models.encoders.contract import pretrained, weights_digest
from imgcap_jax.models.model import parameter_count, split_trained
from imgcap_jax.models.neighbours import NEIGHBOURS
from imgcap_jax.precision import compute_dtype
from imgcap_jax.remote import place, shown, url_of
from imgcap_jax.run.evaluation import SplitEvaluator, evaluated_images
from imgcap_jax.run.extraction import Extraction, uses_store, why_not_stored
from imgcap_jax.run.folder import Run, find_run
from imgcap_jax.run.generation import check_decoding
from imgcap_jax.run.knowledge import index_training_photos
from imgcap_jax.run.members import Member
from imgcap_jax.run.mirror import Mirror
from imgcap_jax.run.notes import check_objective, check_together, starting_notes, without_effect
from imgcap_jax.run.transfer import check_encoder, transfer
from imgcap_jax.run.validation import Draw, Validation, without_best
from imgcap_jax.terminal import Say, Work, working
from imgcap_jax.training.checkpoints import Checkpoints, Progress, restore_best
from imgcap_jax.training.feed import images_of_devices
from imgcap_jax.training.log import LogTo, MetricsLog
from imgcap_jax.training.meter import Meter
from imgcap_jax.training.objective import StepSetup, Teacher
from imgcap_jax.training.optimizer import learning_rate_of, steps_of
from imgcap_jax.training.parallel import DataParallel, is_first_process
from imgcap_jax.training.signals import StopRequest
from imgcap_jax.training.step import TrainState, average_decay, first_state, step_stream

SMOKE_IMAGES = 48


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on.

    Attributes:
        sources: the training split of each dataset of the mixture; weights: their weights.
        validation: the validation split of the first dataset, or its first images.
        all_validation: the number of images of the whole validation split.
        stores: regions of the sources, if they are stored or ready-made; validation_store: of the validation split.
        shards: the number of devices that have all regions together, if this process has only those of its devices.
        vocabulary_sources: the captions that the vocabulary is made of; None: those of ``sources``.
    """

    sources: list[CaptionSource]
    weights: list[float]
    validation: CaptionSource
    all_validation: int
    stores: list[RegionSource] | None = None
    validation_store: RegionSource | None = None
    shards: int | None = None
    vocabulary_sources: list[CaptionSource] | None = None

    @property
    def images(self) -> int:
        """The number of training images."""
        return sum(len(source) for source in self.sources)

    @property
    def mixture(self) -> list[tuple[CaptionSource, float]]:
        """The sources with their weights."""
        return list(zip(self.sources, self.weights, strict=True))

    @property
    def images_per_epoch(self) -> int:
        """The number of training images of an epoch, in which a mixture can repeat images."""
        return sum(rows_per_epoch(self.mixture))


def open_data(experiment: Experiment, smoke: bool) -> Data:
    """Opens the datasets. No image is read."""
    mixture = parse_mixture(experiment.data.dataset)
    sources = [open_source(name, "train", experiment.data.data_dir) for name, _ in mixture]
    validation = open_source(mixture[0][0], "val", experiment.data.data_dir)
    if smoke:
        sources = [source.first(SMOKE_IMAGES) for source in sources]
    all_validation = len(validation)
    validation = validation.first(experiment.training.validation_images or all_validation)
    return Data(sources, [weight for _, weight in mixture], validation, all_validation)


def check_feed(experiment: Experiment) -> None:
    """Raises UserError if ``data.feed`` is "device", but the experiment has no stored features."""
    why, remedy = why_not_stored(experiment)
    if experiment.data.feed == "device" and why:
        raise UserError(f"data.feed is device, but {why}; set it to host, or {remedy}")


def with_features(data: Data, experiment: Experiment, cache: Path, parallel: DataParallel) -> Data:
    """The data with stored regions, which are computed if they are missing, unless the encoder runs in each step."""
    if not uses_store(experiment):
        return data
    extraction = Extraction(experiment, cache, progress=is_first_process(), parallel=parallel)
    views, parts = experiment.data.views, None
    if not extraction.shared and extraction.row_bytes is not None:
        counts = [len(source) for source in data.sources]
        parts = images_of_devices(experiment.data.feed, counts, views, extraction.row_bytes, parallel)
    shards, images = parts or (None, None)
    of_sources: Sequence[list[int] | None] = images or [None] * len(data.sources)
    return replace(
        data,
        shards=shards,
        stores=[
            extraction.regions(source, views=views, images=own)
            for source, own in zip(data.sources, of_sources, strict=True)
        ],
        validation_store=extraction.regions(
            data.validation, views=1, images=evaluated_images(len(data.validation), parallel)
        ),
    )


class Session:
    """A run that is opened for training.

    Attributes:
        experiment, run, data: what is trained, and on what.
        setup: what the objective makes its step from. constants: what that step reads.
        state: the state before the first step of this session, on all devices.
        progress: where training is.
        batches: the batches of the host, at the position of the next one.
        checkpoints, log, validate, meter: where results go. ``start`` makes the meter.
        total_steps: the number of steps of the whole run.
    """

    meter: Meter

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        data: Data,
        parallel: DataParallel,
        stop: StopRequest,
        *,
        cache: Path,
        init_from: Path | None,
        smoke: bool,
        show: Say,
        evaluator: SplitEvaluator | None = None,
        mirror: Mirror | None = None,
        log_to: LogTo | None = None,
        draw: Draw | None = None,
    ) -> None:
        """Opens or resumes the run in the folder.

        Args:
            experiment: what to compute.
            folder: the run's folder.
            data: the datasets, without stored regions.
            parallel: the devices.
            stop: what can end the session.
            cache: folder of the features of frozen encoders.
            init_from: another run, whose best parameters are the start.
            smoke: whether scores are shown, and shares of captions noted.
            show: receives the lines for the user.
            evaluator: of the validation split, for members of a population that share one; None: makes one.
            mirror: pushes the run to its bucket; None: this process does not.
            log_to: the services that get the metrics too.
            draw: draws validation images with their captions for the log; None: captions only.

        Raises:
            UserError: see ``train.train``.
        """
        training = experiment.training
        # The run: its folder and vocabulary.
        with parallel.failing_together():  # the first process writes the folder
            run = _open_run(experiment, folder, data, init_from)
        check_decoding(experiment.decoding, run.vocabulary, experiment.decoder)
        check_objective(experiment.objective, run.vocabulary)
        teachers = _teachers(run)
        check_length(experiment.decoder, experiment.data.max_words + 1, "data.max_words")
        if not run.resumable:
            # Shares of the few captions of a smoke run mean nothing.
            about = (
                without_effect(experiment)
                if smoke
                else starting_notes(experiment, data.sources, data.validation, run.vocabulary)
            )
            for note in about:
                show(f"note: {note}")
        data = with_features(data, experiment, cache, parallel)
        if experiment.compares_photos and not (run.resumable and (folder / NEIGHBOURS).is_file()):
            _index_training_photos(run, data, cache)

        # The model (encoder and decoder, see run/folder.py), on all devices. The state of a resumed run has no values
        # yet.
        checkpoints = Checkpoints(folder, writing=is_first_process())
        resumed = checkpoints.recover(show, parallel.broadcast, parallel.failing_together) is not None
        _check_processes(run, checkpoints.step, parallel)
        started = ""
        with working("loading the model" if resumed else "initialising the model", shown=is_first_process()):
            if run.init_from is not None and not resumed:
                model, started = transfer(run.init_from, run, with_encoder=data.stores is None)
            else:
                model = run.model(with_encoder=data.stores is None, restored=resumed)
        if started:
            show(started)
        graph, params, frozen = split_trained(model)
        steps_per_epoch = max(1, math.ceil(data.images_per_epoch / experiment.data.batch_size))
        total_steps = max(1, steps_of(training.epochs, steps_per_epoch))
        transformation = experiment.optimizer.build(steps_per_epoch, total_steps)
        first = partial(first_state, transformation=transformation, ema=training.ema_decay > 0)
        state = parallel.replicate(jax.eval_shape(first, params) if resumed else first(params))
        frozen = parallel.replicate(frozen)
        progress = None
        if resumed:
            with parallel.failing_together():
                state, progress = checkpoints.restore(state)

        # What the objective makes its step from, and the batches that the step needs.
        references = experiment.objective.references(data.sources, run.vocabulary)
        setup = StepSetup(
            graph=graph,
            params=state.params,
            frozen=frozen,
            transformation=transformation,
            key=step_stream(training.seed),
            steps_per_epoch=steps_per_epoch,
            accumulate=experiment.optimizer.accumulate,
            ema_decay=average_decay(training.ema_decay, initialised=run.init_from is not None),
            vocabulary=run.vocabulary,
            max_words=experiment.decoding.max_words,
            references=references,
            parallel=parallel,
            folder=folder,
            checkpoints=checkpoints,
            teachers=[_loaded(teacher, parallel) for teacher in teachers],
        )
        batches = train_batches(
            experiment.data,
            data.mixture,
            run.vocabulary,
            seed=training.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            features=data.stores,
            references=references,
        )
        self.constants = experiment.objective.constants(setup)

        # The position of the newest checkpoint, if there is one.
        if progress is not None:
            batches.set_state(progress.data)
            show(f"resuming {shown(folder)} at step {progress.step} of {total_steps}")
            for change in run.code_changes():
                show(f"note: {change}")
        else:
            progress = Progress(step=0, data=batches.get_state())
            show(
                f"{data.images} training images, {len(run.vocabulary)} words, "
                f"{parameter_count(params):,} trained parameters, {len(parallel.devices)} "
                f"{parallel.devices[0].platform} device(s), {total_steps} steps of {experiment.objective.title} in "
                f"{compute_dtype(training.dtype)}"
            )
            if data.images_per_epoch != data.images or len(data.sources) > 1:
                show(describe_mixture(data.mixture))
            # From here on, a folder without newest checkpoint has lost it (see find_run).
            checkpoints.save(state, progress)
            with parallel.failing_together():
                checkpoints.wait()
        # Step 0 has no metrics except those of the start's validation.
        log = MetricsLog(
            folder,
            -1 if progress.step == 0 and progress.best is None else progress.step,
            steps_per_epoch=steps_per_epoch,
            seconds=progress.seconds,
            validation_due=progress.validation_due,
            writing=is_first_process(),
            fail=checkpoints.fail,
            to=log_to or LogTo(),
            settings=settings_of(experiment),
            show=show,
        )
        self.validate = Validation(
            evaluator
            or SplitEvaluator(
                [Member(graph, experiment.data, data.validation_store)],
                data.validation,
                run.vocabulary,
                parallel,
                experiment.metrics,
                say=show,
                before_batch=stop.check,
            ),
            frozen,
            data.all_validation,
            experiment.decoding.plain(training.validation_beam),
            checkpoints,
            log,
            show,
            not smoke,
            folder,
            stop,
            draw if is_first_process() else None,
            # Several processes would have to compute it together, each of images that it has not read.
            attends=jax.process_count() == 1 and not has_ready_regions(experiment.encoder),
            resize=experiment.data.resize,
        )
        self.experiment, self.run, self.data, self.setup, self.state = experiment, run, data, setup, state
        self.batches, self.checkpoints, self.log, self.progress = batches, checkpoints, log, progress
        self.total_steps, self._mirror = total_steps, mirror
        self._evaluate_steps = max(1, steps_of(training.evaluate_epochs, steps_per_epoch))
        self._learning_rate = learning_rate_of(experiment.optimizer, steps_per_epoch, total_steps)

    def to_host(self) -> None:
        """Moves the state into the memory of the host, where it stays until ``start`` validates it."""
        self.state = jax.device_get(self.state)
        self.setup = replace(self.setup, params=self.state.params)

    def start(self, work: Work, *, judged: bool = True) -> None:
        """Makes the meter, and validates the state if that is due.

        Args:
            work: shows the progress.
            judged: whether the best score is shown.
        """
        self.meter = Meter(
            self.total_steps,
            self.setup.steps_per_epoch,
            self.experiment.training.log_steps,
            self.progress,
            self.log,
            work,
            self.experiment.objective.progress,
            self._learning_rate,
            judged=judged,
        )
        if self.run.init_from is not None and self.progress.step == 0 and self.progress.best is None:
            # The start is a candidate for the best parameters too: a run never ends worse than it began.
            self.progress = self.validate(self._placed_state, self.progress)
        elif self.progress.best_step != self.checkpoints.best_step:
            self.progress = without_best(self._placed_state, self.progress, self.validate)
        if self.progress.validation_due and not self.validate.interrupted:
            self.progress = self.validate(self._placed_state, self.progress)

    @property
    def _placed_state(self) -> TrainState:
        placed: TrainState = self.setup.parallel.replicate(self.state)
        return placed

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the scores of too many validations were not better."""
        patience = self.experiment.training.patience
        return self.progress.step >= self.total_steps or (patience > 0 and self.progress.misses >= patience)

    @property
    def limit(self) -> int:
        """The number of steps until the next validation or the end."""
        step = self.progress.step
        return min(self._evaluate_steps - step % self._evaluate_steps, self.total_steps - step)

    @property
    def validates(self) -> bool:
        """Whether a validation follows the latest step."""
        return self.progress.step % self._evaluate_steps == 0 or self.progress.step == self.total_steps

    def add(self, steps: int, metrics: Mapping[str, Any], batches: int) -> None:
        """Records steps that were just started. Raises UserError if the loss of a step before them is not finite."""
        position = self.batches.rows.position(batches)
        self.progress = replace(self.progress, step=self.progress.step + steps, data=position)
        self.meter.add(self.progress, metrics, steps)

    @property
    def overdue(self) -> bool:
        """Whether to save now, because ``training.checkpoint_minutes`` have passed."""
        return self.checkpoints.idle_seconds >= 60 * self.experiment.training.checkpoint_minutes

    @property
    def failed(self) -> bool:
        """Whether a save has failed, or the bucket can't be reached. Training then saves, calls ``check``, and ends."""
        return self.checkpoints.failed or (self._mirror is not None and self._mirror.failed)

    def check(self) -> None:
        """Raises UserError if ``failed``. If the bucket can't be reached, the state is saved on this machine."""
        self.checkpoints.check()
        if self._mirror is not None:
            self._mirror.check()

    def save(self, state: TrainState) -> None:
        """Saves the state. Raises UserError if the loss is not finite."""
        self.meter.flush()
        self.checkpoints.save(state, replace(self.progress, seconds=self.log.seconds))

    def drain(self, seconds: float) -> BaseException | None:
        """Waits until everything is on disk, and at most this time until it is in the bucket. See ``StopRequest``."""
        ends = time.monotonic() + seconds
        error = self.checkpoints.drain()
        if error is None and self._mirror is not None:
            error = self._mirror.drain(ends - time.monotonic())
        return error

    def validate_now(self, state: TrainState) -> None:
        """Saves and validates the state. If ``validate.interrupted`` is set then, a resumed session repeats it."""
        self.meter.flush(logged=True)
        # Written while it is validated.
        self.progress = replace(self.progress, validation_due=True)
        self.save(state)
        self.progress = self.validate(state, self.progress)  # also saves the best parameters, and this progress
        self.meter.restart(self.progress)

    def close(self) -> None:
        """Waits for the checkpoints, and closes all files."""
        try:
            self.checkpoints.close()
        finally:
            self.log.close()


def _open_run(experiment: Experiment, folder: Path, data: Data, init_from: Path | None) -> Run:
    """The run in the folder. If nothing was trained there yet, it is made; another experiment's run is refused.

    Nothing is deleted (see ``find_run``).

    The vocabulary is that of the run it starts from, followed by new words of the training captions.
    """
    found = find_run(folder)
    if found is not None:
        if found.resumable:
            found.check_same(experiment, init_from)
            found = found.with_free_fields(experiment, save=is_first_process())
            found.check_weights()
            return found
        if init_from is None and not differences(found.experiment, experiment):
            init_from = found.init_from  # killed before its first checkpoint; the start need not be given again
    experiment.objective.check(dataset=experiment.data.dataset, images=data.images, initialised=init_from is not None)
    check_together(experiment)
    if init_from is not None:
        check_encoder(init_from, experiment)  # before hours of feature extraction; a resumed run has passed it
    tokenizer = experiment.data.tokenizer
    with working("tokenising the training captions", shown=is_first_process()):
        words = total_counts(CaptionTokens.of(source, tokenizer) for source in data.vocabulary_sources or data.sources)
    vocabulary = Vocabulary.from_counts(words, experiment.data.min_count, tokenizer)
    if init_from is not None:
        vocabulary = Run.load(init_from).vocabulary.extended(vocabulary)
    run = Run(folder, experiment, vocabulary, init_from, weights_digest(experiment.encoder))
    if is_first_process():
        run.save()
    return run


def _check_processes(run: Run, step: int | None, parallel: DataParallel) -> None:
    """Checks that all processes train the same experiment in the same folder.

    Raises:
        UserError: on all of them, if they do not.
    """
    if jax.process_count() == 1:
        return
    shared = url_of(run.folder) is not None or parallel.share(run.folder)
    init_from = None if run.init_from is None else shown(run.init_from)
    if not shared:
        raise UserError(
            f"{run.folder} is not the same folder on all hosts; put --run on a shared disk, or in a bucket (gs://...)"
        )
    if not parallel.same((signature(run.experiment), run.vocabulary.words, init_from, step)):
        raise UserError("the processes have different experiments, data or runs; use the same command on all of them")


@contextmanager
def compiling(show: Say, stop: StopRequest, done: int) -> Iterator[None]:
    """Shows that the step is compiled. A signal can end the process meanwhile. done: the number of steps done."""
    title = "compiling the training step"
    with stop.repeatable(done), working(title, shown=is_first_process(), say=show, announced=True):
        yield


def _teachers(run: Run) -> list[Run]:
    """The runs that the objective learns from. Raises UserError if they cannot read the batches of this run."""
    teachers = []
    for folder in getattr(run.experiment.objective, "teachers", ()):
        teacher = Run.load(place(folder))
        check_encoder(teacher.folder, run.experiment, "objective.teachers")
        if not (uses_store(run.experiment) and uses_store(teacher.experiment)):
            raise UserError(
                f"{folder} cannot be a teacher: it and this run must have a frozen encoder and stored features"
            )
        for name in ("image_size", "resize"):
            ours, theirs = (getattr(one.experiment.data, name) for one in (run, teacher))
            if ours != theirs:
                raise UserError(f"{folder} cannot be a teacher: its data.{name} is {theirs}, not {ours}")
        if teacher.vocabulary.words != run.vocabulary.words:
            raise UserError(f"{folder} cannot be a teacher: its vocabulary differs; train it on the same captions")
        # Its retrieval excludes a training photo by the number of the photo.
        if teacher.experiment.retrieval is not None and teacher.experiment.data.dataset != run.experiment.data.dataset:
            raise UserError(f"{folder} cannot be a teacher: it has retrieval, and its data.dataset differs")
        teachers.append(teacher)
    return teachers


def _loaded(teacher: Run, parallel: DataParallel) -> Teacher:
    graph, params, frozen = split_trained(teacher.model(with_encoder=False, restored=True))
    best, _ = restore_best(teacher.folder, parallel.replicate(params))
    return Teacher(graph, best, parallel.replicate(frozen))


def _index_training_photos(run: Run, data: Data, cache: Path) -> None:
    """Writes the index of the training photos, by stored regions or else by the pretrained features of the encoder.

    Raises UserError if there are several processes, or if the encoder is trained from scratch.
    """
    if jax.process_count() > 1:
        raise UserError("the training photos are compared in one process; leave out --distributed, or neighbours")
    stores = data.stores
    if stores is None:
        try:
            encoder = pretrained(run.experiment.encoder)
        except UserError as error:
            raise UserError(f"neighbours are found by pretrained features: {error}; leave out neighbours") from error
        # Of the photos themselves: view 0.
        plain = replace(run.experiment.data, views=1, augmentation=Augmentation())
        extraction = Extraction(replace(run.experiment, encoder=encoder, data=plain), cache)
        stores = [extraction.regions(source, views=1) for source in data.sources]
    index_training_photos(run, data.sources, stores)
