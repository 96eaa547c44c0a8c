"""The training loop: reads top to bottom, and is the file to fork for an idea of one's own."""

import hashlib
import math
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.pipeline import train_batches
from imgcap_jax.data.prefetch import device_prefetch
from imgcap_jax.data.sources import CaptionSource, open_source, parse_mixture
from imgcap_jax.data.vocabulary import Vocabulary
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, differences, signature
from imgcap_jax.files import OWNER, owning, write_text
from imgcap_jax.metrics.cider_device import DocumentFrequencies, document_frequencies
from imgcap_jax.models.model import Params, parameter_count, split_trained
from imgcap_jax.run.evaluation import Captioned, Member, SplitEvaluator
from imgcap_jax.run.extraction import Extraction, uses_store
from imgcap_jax.run.folder import Run
from imgcap_jax.run.generation import bad_endings, check_decoding
from imgcap_jax.run.transfer import check_encoder, transfer
from imgcap_jax.training.checkpoints import Checkpoints, Progress
from imgcap_jax.training.cross_entropy import cross_entropy_step
from imgcap_jax.training.log import MetricsLog
from imgcap_jax.training.meter import Meter
from imgcap_jax.training.parallel import DataParallel
from imgcap_jax.training.self_critical import Constants, SelfCritical, self_critical_step
from imgcap_jax.training.signals import StopRequest
from imgcap_jax.training.step import first_state

SMOKE_IMAGES = 48


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended: steps done, best validation CIDEr-D (fraction), stopped by a signal or not."""

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
    show: Callable[[str], None] = print,
) -> Outcome:
    """Trains ``experiment`` in ``folder``, going on from its newest checkpoint where there is one.

    Args:
        experiment: what to compute.
        folder: the run's folder.
        cache: where features of frozen encoders are kept.
        init_from: another run whose best parameters are the start; its vocabulary is mapped by word.
        smoke: read only the first images of each split, and start anew.
        show: gets the lines for the user.

    Raises:
        UserError: bad input, another experiment in the folder, another process that trains there, a loss that
            is not finite, a full disk.
    """
    if jax.process_index() != 0:
        folder.mkdir(parents=True, exist_ok=True)
        return _train(experiment, folder, cache, init_from, smoke, lambda line: None)
    with owning(folder, "training"):
        if smoke:  # a finished smoke run would check nothing
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != OWNER:
                    path.unlink()
        return _train(experiment, folder, cache, init_from, smoke, show)


def _train(
    experiment: Experiment,
    folder: Path,
    cache: Path,
    init_from: Path | None,
    smoke: bool,
    show: Callable[[str], None],
) -> Outcome:
    training, data = experiment.training, experiment.data
    parallel = DataParallel(training.parallel)
    parallel.check_batch_size(data.batch_size, experiment.optimizer.accumulate)

    # Data: the training mixture, the first dataset's validation split, words from training captions only.
    names = parse_mixture(data.dataset)
    sources = [open_source(name, "train", data.data_dir) for name, _ in names]
    validation = open_source(names[0][0], "val", data.data_dir)
    if smoke:
        sources = [source.first(SMOKE_IMAGES) for source in sources]
    validation = validation.first(training.validation_images or len(validation))
    run = _open_run(experiment, folder, sources, init_from)
    parallel.agree(0)  # the first process may have cleared the folder
    vocabulary = run.vocabulary
    check_decoding(experiment.decoding, vocabulary, experiment.decoder)
    longest = getattr(experiment.decoder, "max_length", None)
    if longest is not None and data.max_words + 1 > longest:
        raise UserError(f"decoder.max_length is {longest}; give at least data.max_words + 1 = {data.max_words + 1}")

    # Features, once, where the encoder never changes.
    stored = uses_store(experiment)
    extraction = Extraction(experiment, cache, progress=jax.process_index() == 0)
    stores = [extraction.regions(source, views=data.views) for source in sources] if stored else None
    validation_store = extraction.regions(validation, views=1) if stored else None

    # The model, its optimizer and the compiled step.
    model = run.model(with_encoder=not stored)
    checkpoints = Checkpoints(folder, writing=True)
    _check_processes(run, checkpoints.step, parallel)
    if run.init_from is not None and checkpoints.step is None:
        show(transfer(run.init_from, model, vocabulary))
    graph, params, frozen = split_trained(model)
    steps_per_epoch = max(1, math.ceil(sum(len(source) for source in sources) / data.batch_size))
    total_steps = max(1, round(training.epochs * steps_per_epoch))
    evaluate_steps = max(1, round(training.evaluate_epochs * steps_per_epoch))
    transformation = experiment.optimizer.build(steps_per_epoch, total_steps)
    state = parallel.replicate(first_state(params, transformation, ema=training.ema_decay > 0))
    frozen = parallel.replicate(frozen)
    settings: dict[str, Any] = {
        "key": jax.random.key(training.seed),
        "accumulate": experiment.optimizer.accumulate,
        "ema_decay": training.ema_decay,
    }
    objective, constants, references = experiment.objective, frozen, None
    if isinstance(objective, SelfCritical):
        references = CaptionTable.as_references(sources, vocabulary, eos=objective.reward_eos)
        frequencies = _document_frequencies(folder, references, resumed=checkpoints.step is not None)
        start = _start(state.params, checkpoints) if objective.kl else None
        constants = Constants(frozen, *parallel.replicate((frequencies, start)))
        settings |= {"max_words": experiment.decoding.max_words, "bad_endings": bad_endings(vocabulary)}
        step = parallel.compile(self_critical_step(graph, objective, transformation, **settings))
    else:
        settings["steps_per_epoch"] = steps_per_epoch
        step = parallel.compile(cross_entropy_step(graph, objective, transformation, **settings))
    evaluator = SplitEvaluator([Member(graph, data, validation_store)], validation, vocabulary, parallel)

    # Where the run stands.
    batches = train_batches(
        data,
        [(source, weight) for source, (_, weight) in zip(sources, names, strict=True)],
        vocabulary,
        seed=training.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        features=stores,
        references=references,
    )
    progress = Progress(step=0, data=batches.get_state())
    if checkpoints.step is not None:
        state, progress = checkpoints.restore(state)
        batches.set_state(progress.data)
        show(f"resuming {folder} at step {progress.step} of {total_steps}")
    else:
        show(
            f"{sum(len(source) for source in sources)} training images, {len(vocabulary)} words, "
            f"{parameter_count(params):,} trained parameters, {len(parallel.devices)} "
            f"{parallel.devices[0].platform} device(s), {total_steps} steps of {objective.title}"
        )
    log = MetricsLog(folder, progress.step if checkpoints.step is not None else -1, writing=jax.process_index() == 0)
    meter = Meter(total_steps, steps_per_epoch, training.log_steps, progress.step, log, show, objective.progress)
    saved = time.monotonic()
    prefetched = device_prefetch(batches, lambda batch: parallel.put(_device_part(batch)))
    stop = StopRequest()
    interrupted = 0

    def validated(progress: Progress) -> Progress:
        search = experiment.decoding.plain(training.validation_beam)
        captioned = evaluator.caption([state.best_guess], [frozen], search)
        degeneration, warnings = evaluator.degeneration(captioned)
        scores = {
            **evaluator.score(captioned.captions).values,
            **evaluator.teacher_forced(state.best_guess, frozen),
            **asdict(degeneration),
        }
        progress = _judge(progress, scores["CIDEr-D"])
        if progress.best_step == progress.step:
            checkpoints.save_best(progress.step, state.best_guess)
        log.write("validation", progress.step, scores)
        show(_validation_line(progress, scores, captioned))
        for warning in warnings:
            show(f"  note: {warning}")
        return progress

    done = _finished(experiment, progress, total_steps)
    with stop, prefetched:
        if run.init_from is not None and progress.step == 0 and progress.best is None:
            # The start is a candidate too: a run that never gets better than it ends as good.
            progress = validated(progress)
            checkpoints.save(state, progress)
        while not done:
            batch, data_state = next(prefetched)
            state, metrics = step(state, constants, batch)
            progress = replace(progress, step=progress.step + 1, data=data_state)
            meter.add(progress.step, metrics)

            if progress.step % evaluate_steps == 0 or progress.step == total_steps:
                meter.flush()
                progress = validated(progress)
            done = _finished(experiment, progress, total_steps)
            overdue = int(time.monotonic() - saved > 60 * training.checkpoint_minutes)
            # Several processes have to agree on when to save, for which they wait for each other: not at each step.
            meeting = progress.step % training.log_steps == 0 or progress.step % evaluate_steps == 0
            if jax.process_count() == 1 or meeting:
                interrupted, overdue = parallel.agree(stop.signal or 0, overdue)
            else:
                overdue = 0
            if done or interrupted or overdue or progress.step % evaluate_steps == 0:
                meter.flush()  # a loss that is not finite must not reach a checkpoint
                checkpoints.save(state, progress)
                saved = time.monotonic()
                meter.restart(progress.step)
            if interrupted:
                break
    checkpoints.close()
    log.close()
    return Outcome(progress.step, progress.best, interrupted or None)


def _document_frequencies(folder: Path, references: CaptionTable, *, resumed: bool) -> DocumentFrequencies:
    """Those of the training captions: counted once, and kept in the run."""
    path = folder / "document_frequencies.npz"
    if resumed and path.is_file():
        return DocumentFrequencies.load(path, references.fingerprint)
    frequencies = document_frequencies(list(references.captions()), references.words)
    if jax.process_index() == 0:
        frequencies.save(path, references.fingerprint)
    return frequencies


def _start(params: Params, checkpoints: Checkpoints) -> Params:
    """A copy of the parameters that training began with, which outlives the run that they come from."""
    if checkpoints.step is not None:
        return checkpoints.restore_start(params)
    checkpoints.keep_start(params)
    return jax.tree.map(jnp.copy, params)  # the state's own are given away


def _open_run(experiment: Experiment, folder: Path, sources: Sequence[CaptionSource], init_from: Path | None) -> Run:
    """The folder's run, made where nothing was trained yet; never another experiment's.

    Its words are those of the training captions, after all those of the run it starts from.
    """
    if Run.exists(folder):
        run = Run.load(folder)
        if any((folder / "checkpoints" / "newest").glob("[0-9]*")):
            run.check_same(experiment, init_from)
            return run
        if init_from is None and not differences(run.experiment, experiment):
            init_from = run.init_from  # killed before its first checkpoint; the start need not be named again
    if init_from is None and isinstance(experiment.objective, SelfCritical):
        raise UserError(
            "self-critical training refines a model that writes captions already: train one with cross-entropy, then "
            "give --init-from RUN"
        )
    if isinstance(experiment.objective, SelfCritical) and sum(len(source) for source in sources) < 2:
        raise UserError(f"{experiment.data.dataset}: one training image has no document frequencies; give two or more")
    if init_from is not None:
        check_encoder(init_from, experiment)  # here and once: before hours go into features, and not on resuming
    captions = (caption for source in sources for i in range(len(source)) for caption in source.captions(i))
    vocabulary = Vocabulary.build(captions, experiment.data.min_count)
    if init_from is not None:
        vocabulary = Run.load(init_from).vocabulary.extended(vocabulary)
    run = Run(folder, experiment, vocabulary, init_from)
    if jax.process_index() == 0:
        # What a run that came to nothing left behind.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        run.save()
    return run


def _check_processes(run: Run, step: int | None, parallel: DataParallel) -> None:
    """Makes sure that all processes train the same, in the same folder.

    Raises:
        UserError: on all of them, where they do not.
    """
    if jax.process_count() == 1:
        return
    note = run.folder / ".processes"
    nonce = parallel.broadcast(secrets.randbits(31))
    if jax.process_index() == 0:
        write_text(note, str(nonce))
    parallel.agree(0)  # all wait until it is written
    shared = note.is_file() and note.read_text() == str(nonce)
    start = signature(run.experiment), run.vocabulary.words, str(run.init_from), step
    digest = int.from_bytes(hashlib.sha256(repr(start).encode()).digest()[:4], "big") >> 1
    largest, smallest, apart = parallel.agree(digest, -digest, not shared)
    if apart:
        raise UserError(f"{run.folder} is not the same folder on all hosts; put --run on a disk that they share")
    if largest != -smallest:
        raise UserError("the processes have different experiments, data or runs; give all of them the same command")


def _device_part(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the step reads of a batch: all but the ids, and each row's index in the global batch.

    Where references are given, captions are sampled, and those drawn from the data are not read.
    """
    rows = len(batch["weight"])
    unread = {"image_id", "tokens"} if "references" in batch else {"image_id"}
    part = {name: leaf for name, leaf in batch.items() if name not in unread}
    # As the pipeline deals rows out to processes, so that dropout doesn't depend on their number.
    part["row"] = np.arange(rows, dtype=np.int32) * jax.process_count() + jax.process_index()
    return part


def _judge(progress: Progress, cider: float) -> Progress:
    """Notes a validation: selection is by freely decoded CIDEr-D, never by teacher-forced scores."""
    if progress.best is None or cider > progress.best:
        return replace(progress, best=cider, best_step=progress.step, misses=0)
    return replace(progress, misses=progress.misses + 1)


def _finished(experiment: Experiment, progress: Progress, total_steps: int) -> bool:
    patience = experiment.training.patience
    return progress.step >= total_steps or (patience > 0 and progress.misses >= patience)


def _validation_line(progress: Progress, scores: Mapping[str, float], captioned: Captioned) -> str:
    best = "best so far" if progress.best_step == progress.step else f"best {100 * (progress.best or 0):.1f}"
    return (
        f"validation at step {progress.step}: CIDEr-D {100 * scores['CIDEr-D']:.1f} ({best})  "
        f"BLEU-4 {100 * scores['BLEU-4']:.1f}  teacher-forced perplexity "
        f"{scores['teacher_forced_perplexity']:.2f}  {captioned.images_per_second:.0f} images/s"
    )
