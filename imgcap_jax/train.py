"""Trains an experiment. The file reads from top to bottom. It is the one to fork for an idea with its own loop."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from imgcap_jax.data.caption_tokens import CaptionTokens, total_counts
from imgcap_jax.data.mixtures import describe_mixture, rows_per_epoch
from imgcap_jax.data.pipeline import train_batches
from imgcap_jax.data.regions import RegionSource
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import Experiment, differences, signature
from imgcap_jax.files import check_name, local_path, owning
from imgcap_jax.models.decoders.contract import check_length
from imgcap_jax.models.encoders.contract import weights_digest
from imgcap_jax.models.model import Frozen, parameter_count, split_trained
from imgcap_jax.precision import at_precision, compute_dtype
from imgcap_jax.report import smoke as smoke_report
from imgcap_jax.run.evaluation import Captioned, Member, SplitEvaluator, evaluated_images, naming_run
from imgcap_jax.run.extraction import Extraction, uses_store
from imgcap_jax.run.folder import Run, empty_smoke, find_run, nothing_left_if_refused
from imgcap_jax.run.generation import check_decoding
from imgcap_jax.run.notes import check_objective, check_together, starting_notes, without_effect
from imgcap_jax.run.transfer import check_encoder, transfer
from imgcap_jax.terminal import Say, working
from imgcap_jax.training.checkpoints import Checkpoints, Progress
from imgcap_jax.training.feed import open_feed
from imgcap_jax.training.log import MetricsLog, Sample
from imgcap_jax.training.meter import Meter
from imgcap_jax.training.objective import StepSetup
from imgcap_jax.training.optimizer import learning_rate_of, steps_of
from imgcap_jax.training.parallel import DataParallel, is_first_process
from imgcap_jax.training.signals import Stopped, StopRequest
from imgcap_jax.training.step import TrainState, average_decay, first_state, step_stream

SMOKE_IMAGES = 48
_SAMPLES = 5  # validation images whose captions are logged


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended.

    step: steps done. best: highest validation CIDEr-D (0 to 10). interrupted: the signal that ended it, or None.
    """

    step: int
    best: float | None
    interrupted: int | None


def train(
    experiment: Experiment,
    folder: Path,
    *,
    cache: Path,
    init_from: Path | None = None,
    smoke: bool = False,
    show: Say = print,
) -> Outcome:
    """Trains ``experiment`` in ``folder``. Resumes from the newest checkpoint if there is one.

    Args:
        experiment: what to compute.
        folder: the run's folder.
        cache: folder of the features of frozen encoders.
        init_from: another run, whose best parameters are the start; its vocabulary is mapped by word.
        smoke: use only the first images of each split, and start from scratch.
        show: receives the lines for the user. A terminal also shows a bar.

    Raises:
        UserError: bad input, another experiment in the folder, another process that trains in it, a loss that is not
            finite, or a full disk.
    """
    local_path(str(folder))
    for path in (folder.absolute(), *([] if init_from is None else [init_from.absolute()])):
        check_name(path)
    if jax.process_index() != 0:
        folder.mkdir(parents=True, exist_ok=True)
        return _train(experiment, folder, cache, init_from, smoke, lambda line: None)
    with owning(folder, "training"), nothing_left_if_refused(folder):
        if smoke:  # resuming a finished smoke run would check nothing
            empty_smoke(folder)
        return _train(experiment, folder, cache, init_from, smoke, show)


def _train(
    experiment: Experiment, folder: Path, cache: Path, init_from: Path | None, smoke: bool, show: Say
) -> Outcome:
    training = experiment.training
    parallel = DataParallel(training.parallel)
    parallel.check_batch_size(experiment.data.batch_size, experiment.optimizer.accumulate)

    # The data, and the run: its folder and vocabulary.
    data = _open_data(experiment, smoke)
    run = _open_run(experiment, folder, data, init_from)
    parallel.wait()  # the first process may have written the folder
    check_decoding(experiment.decoding, run.vocabulary, experiment.decoder)
    check_objective(experiment.objective, run.vocabulary)
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
    data = _with_features(data, experiment, cache, parallel)

    # The model (encoder and decoder, see run/folder.py), on all devices. The state of a resumed run has no values yet.
    checkpoints = Checkpoints(folder, writing=is_first_process())
    resumed = checkpoints.recover(show, parallel.broadcast) is not None
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
        state, progress = checkpoints.restore(state)

    # The objective's compiled step, and the batches that it needs.
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
    )
    constants = experiment.objective.constants(setup)
    stop = StopRequest(
        show,
        agree=parallel.agree,
        processes=jax.process_count(),
        drain=checkpoints.drain,
        again=f"the same command {'starts again' if smoke else 'resumes'}",
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

    # The position of the newest checkpoint, if there is one.
    if progress is not None:
        batches.set_state(progress.data)
        show(f"resuming {folder} at step {progress.step} of {total_steps}")
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
        checkpoints.wait()
    # Step 0 has no metrics except those of the start's validation.
    log = MetricsLog(
        folder,
        -1 if progress.step == 0 and progress.best is None else progress.step,
        steps_per_epoch=steps_per_epoch,
        seconds=progress.seconds,
        validation_due=progress.validation_due,
        writing=is_first_process(),
    )
    member = Member(graph, experiment.data, data.validation_store)
    validate = Validation(
        experiment, member, frozen, data, run.vocabulary, parallel, checkpoints, log, show, not smoke, folder, stop
    )
    learning_rate = learning_rate_of(experiment.optimizer, steps_per_epoch, total_steps)

    # The loop.
    evaluate_steps = max(1, steps_of(training.evaluate_epochs, steps_per_epoch))
    # Traced within the model's precision, which covers derivatives too.
    step = at_precision(experiment.objective.make_step(setup), compute_dtype(training.dtype))
    feed = open_feed(step, batches, parallel, show, partial(_compiling, show, stop))
    # Within StopRequest, Ctrl-C and SIGTERM set stop.signal, and the loop ends after the present call of the feed, or a
    # validation after the present batch. A second Ctrl-C raises KeyboardInterrupt.
    with (
        stop,
        closing(checkpoints),
        closing(log),
        feed,
        working("", total_steps, "steps", done=progress.step, shown=is_first_process(), say=show) as work,
    ):
        meter = Meter(
            total_steps,
            steps_per_epoch,
            training.log_steps,
            progress,
            log,
            work,
            experiment.objective.progress,
            learning_rate,
            judged=not smoke,
        )
        if run.init_from is not None and progress.step == 0 and progress.best is None:
            # The start is a candidate for the best parameters too: a run never ends worse than it began.
            progress = validate(state, progress)
        elif progress.best_step != checkpoints.best_step:
            progress = _without_best(state, progress, validate)
        if progress.validation_due and not validate.interrupted:
            progress = validate(state, progress)
        interrupted = validate.interrupted
        done = _finished(experiment, progress, total_steps)
        while not (done or interrupted):
            until_validation = evaluate_steps - progress.step % evaluate_steps
            state, ran = feed.run(state, constants, min(until_validation, total_steps - progress.step))
            progress = replace(progress, step=progress.step + ran.steps, data=batches.rows.position(ran.batches))
            meter.add(progress, ran.metrics, ran.steps)

            validates = progress.step % evaluate_steps == 0
            if validates or progress.step == total_steps:
                meter.flush(logged=True)
                # Written while it is validated. If that is interrupted, it is repeated.
                progress = replace(progress, validation_due=True)
                checkpoints.save(state, replace(progress, seconds=log.seconds))
                progress = validate(state, progress)  # also saves the best parameters, and this progress
                if interrupted := validate.interrupted:
                    break
            done = _finished(experiment, progress, total_steps)

            checkpoints.check()
            overdue = int(checkpoints.idle_seconds >= 60 * training.checkpoint_minutes)
            # Several processes must agree on when to save. They wait for each other, so they do not do it at each step.
            if jax.process_count() == 1 or validates or ran.steps > 1 or progress.step % training.log_steps == 0:
                interrupted, overdue = parallel.agree(stop.signal or 0, overdue)
            else:
                overdue = 0
            if done or interrupted or overdue or validates:
                meter.flush()  # raises if the loss is not finite, before the state is saved
                checkpoints.save(state, replace(progress, seconds=log.seconds))
                meter.restart(progress)
            if interrupted:
                break
        if done and not interrupted:
            validate.advise()
        if smoke and not interrupted:
            _check_restored(checkpoints, state)
    if smoke and not interrupted:
        for line in smoke_report.lines(
            experiment,
            images=data.images,
            validation_images=len(data.validation),
            steps=progress.step,
            losses=meter.losses,
            decoding=validate.search,
            metrics=validate.metrics,
        ):
            show(line)
    return Outcome(progress.step, progress.best, interrupted or None)


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on.

    Attributes:
        sources: the training split of each dataset of the mixture; weights: their weights.
        validation: the validation split of the first dataset, or its first images.
        all_validation: the number of images of the whole validation split.
        stores: regions of the sources, if they are stored or ready-made; validation_store: of the validation split.
    """

    sources: list[CaptionSource]
    weights: list[float]
    validation: CaptionSource
    all_validation: int
    stores: list[RegionSource] | None = None
    validation_store: RegionSource | None = None

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


def _open_data(experiment: Experiment, smoke: bool) -> Data:
    """Opens the datasets. No image is read."""
    mixture = parse_mixture(experiment.data.dataset)
    sources = [open_source(name, "train", experiment.data.data_dir) for name, _ in mixture]
    validation = open_source(mixture[0][0], "val", experiment.data.data_dir)
    if smoke:
        sources = [source.first(SMOKE_IMAGES) for source in sources]
    all_validation = len(validation)
    validation = validation.first(experiment.training.validation_images or all_validation)
    return Data(sources, [weight for _, weight in mixture], validation, all_validation)


def _with_features(data: Data, experiment: Experiment, cache: Path, parallel: DataParallel) -> Data:
    """The data with stored regions, which are computed if they are missing, unless the encoder runs in each step."""
    if not uses_store(experiment):
        return data
    extraction = Extraction(experiment, cache, progress=is_first_process(), parallel=parallel)
    return replace(
        data,
        stores=[extraction.regions(source, views=experiment.data.views) for source in data.sources],
        validation_store=extraction.regions(
            data.validation, views=1, images=evaluated_images(len(data.validation), parallel)
        ),
    )


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
        words = total_counts(CaptionTokens.of(source, tokenizer) for source in data.sources)
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
    shared = parallel.share(run.folder)
    start = signature(run.experiment), run.vocabulary.words, str(run.init_from), step
    digest = int.from_bytes(hashlib.sha256(repr(start).encode()).digest()[:4], "big") >> 1
    largest, smallest, apart = parallel.agree(digest, -digest, not shared)
    if apart:
        raise UserError(f"{run.folder} is not the same folder on all hosts; put --run on a shared disk")
    if largest != -smallest:
        raise UserError("the processes have different experiments, data or runs; use the same command on all of them")


@contextmanager
def _compiling(show: Say, stop: StopRequest) -> Iterator[None]:
    """Shows that the step is compiled. A signal can end the process meanwhile."""
    with stop.repeatable(), working("compiling the training step", shown=is_first_process(), say=show, announced=True):
        yield


@dataclass
class Validation:
    """Decodes and scores the validation split, and saves the parameters if they are the best (see ``_select``).

    Attributes:
        judged: whether scores and defects of captions are shown. Those of a smoke run mean nothing.
        folder: the run's folder.
        stop: what can interrupt it.
        metrics: the names of the scores; empty before the first validation.
        interrupted: the signal that has interrupted it, or 0.
    """

    experiment: Experiment
    member: Member
    frozen: Frozen
    data: Data
    vocabulary: Vocabulary
    parallel: DataParallel
    checkpoints: Checkpoints
    log: MetricsLog
    show: Say
    judged: bool
    folder: Path
    stop: StopRequest

    def __post_init__(self) -> None:
        self.metrics: list[str] = []
        self.interrupted = 0
        self._evaluator = SplitEvaluator(
            [self.member],
            self.data.validation,
            self.vocabulary,
            self.parallel,
            self.experiment.metrics,
            say=self.show,
            before_batch=self.stop.check,
        )
        ids = list(self._evaluator.references)
        self._sampled = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, _SAMPLES).astype(int))]
        self._advice: list[str] = []
        self._shown: set[str] = set()  # notes about the references, which would repeat at each validation

    @property
    def search(self) -> Decoding:
        """The decoding settings of validations."""
        return self.experiment.decoding.plain(self.experiment.training.validation_beam)

    def __call__(self, state: TrainState, progress: Progress) -> Progress:
        """Validates the state after ``progress.step`` steps, of which there is a checkpoint.

        Returns:
            The progress with the result, which is saved. If it is interrupted, the progress with its validation due.
        """
        evaluator, params = self._evaluator, state.best_guess
        try:
            with self.stop.repeatable():
                captioned = evaluator.caption([params], [self.frozen], self.search)
                degeneration, warnings = evaluator.degeneration(captioned)
                scored = evaluator.score(captioned.captions)
                teacher_forced = evaluator.teacher_forced(params, self.frozen)
        except Stopped as stopped:
            self.interrupted = stopped.number
            return replace(progress, validation_due=True)
        scores = {**scored.values, **teacher_forced, **asdict(degeneration)}
        progress, note = _select(replace(progress, validation_due=False), scores)
        self._advice = naming_run(warnings, self.folder)
        if progress.best_step == progress.step:
            self.checkpoints.save_best(progress.step, params)
        self.metrics = list(scored.values)
        self.log.write("validation", progress.step, {**scores, "images_per_second": captioned.images_per_second})
        self.log.write_samples(progress.step, [self._sample(image_id, captioned) for image_id in self._sampled])
        self.checkpoints.save_validated(replace(progress, seconds=self.log.seconds))
        if not self.judged:
            count = counted(len(captioned.captions), "image")
            self.show(f"validation at step {progress.step}: {count} decoded and scored")
            return progress
        images = counted(len(captioned.captions), "image")
        if len(captioned.captions) < self.data.all_validation:
            images = f"{len(captioned.captions):,} of {self.data.all_validation:,} images"
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

    def _sample(self, image_id: int, captioned: Captioned) -> Sample:
        evaluator = self._evaluator
        return Sample(
            image_id, evaluator.file_names[image_id], captioned.captions[image_id], evaluator.references[image_id]
        )


def _select(progress: Progress, scores: Mapping[str, float]) -> tuple[Progress, list[str]]:
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


def _check_restored(checkpoints: Checkpoints, state: TrainState) -> None:
    """Raises UserError unless the newest checkpoint contains this state, and the best one can be restored."""
    restored, _ = checkpoints.restore(state)
    checkpoints.restore_best(state.best_guess)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(restored), strict=True):
        if not np.array_equal(np.asarray(ours), np.asarray(theirs)):
            raise UserError(
                f"{checkpoints.folder}: {jax.tree_util.keystr(path)} of the restored checkpoint differs from what was "
                f"saved; check the disk"
            )


def _without_best(state: TrainState, progress: Progress, validate: "Validation") -> Progress:
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


def _finished(experiment: Experiment, progress: Progress, total_steps: int) -> bool:
    patience = experiment.training.patience
    return progress.step >= total_steps or (patience > 0 and progress.misses >= patience)


def _validation_line(progress: Progress, scores: Mapping[str, float], captioned: Captioned, how: str) -> str:
    best = "best so far" if progress.best_step == progress.step else f"best {100 * (progress.best or 0):.1f}"
    return (
        f"validation at step {progress.step} ({how}): CIDEr-D {100 * scores['CIDEr-D']:.1f} ({best})  "
        f"BLEU-4 {100 * scores['BLEU-4']:.1f}  teacher-forced perplexity "
        f"{scores['teacher_forced_perplexity']:.2f}  {captioned.images_per_second:.0f} images/s"
    )
