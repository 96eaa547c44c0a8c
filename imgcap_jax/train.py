"""Trains an experiment. The file reads from top to bottom. It is the one to fork for an idea with its own loop."""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.files import check_name, disk_errors, owning
from imgcap_jax.precision import at_precision, compute_dtype
from imgcap_jax.remote import place
from imgcap_jax.report import smoke as smoke_report
from imgcap_jax.report.attention import sample_picture
from imgcap_jax.run.extraction import why_not_stored
from imgcap_jax.run.folder import empty_smoke, nothing_left_if_refused
from imgcap_jax.run.hub import run_place
from imgcap_jax.run.mirror import Mirror, pull
from imgcap_jax.session import Data, Session, check_feed, compiling, open_data
from imgcap_jax.terminal import Say, working
from imgcap_jax.training.checkpoints import Checkpoints
from imgcap_jax.training.feed import open_feed
from imgcap_jax.training.log import LogTo
from imgcap_jax.training.parallel import DataParallel, is_first_process
from imgcap_jax.training.signals import StopRequest
from imgcap_jax.training.step import TrainState


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
    data: Data | None = None,
    log_to: LogTo | None = None,
    show: Say = print,
) -> Outcome:
    """Trains ``experiment`` in ``folder``. Resumes from the newest checkpoint if there is one.

    Args:
        experiment: what to compute.
        folder: the run's folder; it can be in a bucket (``gs://bucket/runs/x``), then no disk needs to be shared.
        cache: folder of the features of frozen encoders.
        init_from: another run, whose best parameters are the start; its vocabulary is mapped by word.
        smoke: use only the first images of each split, and start from scratch.
        data: the datasets, without stored regions; None: those of the experiment.
        log_to: the services that get the metrics too.
        show: receives the lines for the user. A terminal also shows a bar.

    Raises:
        UserError: bad input, another experiment in the folder, another process that trains in it, a loss that is not
            finite, or a full disk.
    """
    folder = place(str(folder))
    init_from = None if init_from is None else run_place(str(init_from))
    for path in (folder.absolute(), *([] if init_from is None else [init_from.absolute()])):
        check_name(path)
    together = DataParallel(experiment.training.parallel)
    if not is_first_process():
        # Until the first process has pushed what an interruption left.
        with together.failing_together(), disk_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        with together.failing_together():
            pull(folder, to_train=True)
        return _train(experiment, folder, cache, init_from, smoke, data, lambda line: None, None, None)
    with ExitStack() as stack:
        with together.failing_together():
            stack.enter_context(owning(folder, "training"))
            mirror = stack.enter_context(Mirror(folder))
            stack.enter_context(nothing_left_if_refused(folder))
            if smoke:  # resuming a finished smoke run would check nothing
                empty_smoke(folder)
        with together.failing_together():
            pass  # the other processes pull
        return _train(experiment, folder, cache, init_from, smoke, data, show, mirror, log_to)


def _train(
    experiment: Experiment,
    folder: Path,
    cache: Path,
    init_from: Path | None,
    smoke: bool,
    data: Data | None,
    show: Say,
    mirror: Mirror | None,
    log_to: LogTo | None,
) -> Outcome:
    training = experiment.training
    parallel = DataParallel(training.parallel)
    check_feed(experiment)
    parallel.check_batch_size(experiment.data.batch_size, experiment.optimizer.accumulate)
    stop = StopRequest(
        show,
        agree=parallel.agree,
        processes=jax.process_count(),
        drain=lambda seconds: session.drain(seconds),
        again=f"the same command {'starts again' if smoke else 'resumes'}",
    )
    # The data, the model, its state, the checkpoints and the log.
    session = Session(
        experiment,
        folder,
        data or open_data(experiment, smoke),
        parallel,
        stop,
        cache=cache,
        init_from=init_from,
        smoke=smoke,
        show=show,
        mirror=mirror,
        log_to=log_to,
        draw=sample_picture,
    )
    # Traced within the model's precision, which covers derivatives too.
    step = at_precision(experiment.objective.make_step(session.setup), compute_dtype(training.dtype))
    total, done = session.total_steps, session.progress.step
    # Within StopRequest, Ctrl-C and SIGTERM set stop.signal, and the loop ends after the present call of the feed, or a
    # validation after the present batch. Ctrl-C after Ctrl-C raises KeyboardInterrupt, and after SIGTERM Terminated.
    with (
        stop,
        closing(session),
        open_feed(
            step,
            session.batches,
            parallel,
            show,
            partial(compiling, show, stop, done),
            session.data.shards,
            why_not_stored(experiment)[0],
        ) as feed,
        working("", total, "steps", done=done, shown=is_first_process(), say=show) as work,
    ):
        session.start(work, judged=not smoke)
        state, interrupted = session.state, session.validate.interrupted
        while not (session.finished or interrupted):
            state, ran = feed.run(state, session.constants, session.limit)
            session.add(ran.steps, ran.metrics, ran.batches)
            validates = session.validates
            if validates:
                session.validate_now(state)
                if interrupted := session.validate.interrupted:
                    break
            # Several processes must agree on when to save, and end together if the first one cannot write. They wait
            # for each other, so they do not do it at each step.
            step_number, overdue, failed = session.progress.step, 0, 0
            if jax.process_count() == 1 or validates or ran.steps > 1 or step_number % training.log_steps == 0:
                wishes = stop.signal or 0, int(session.overdue), int(session.failed)
                interrupted, overdue, failed = parallel.agree(*wishes)
            if interrupted or overdue or failed:
                session.save(state)
                session.meter.restart(session.progress)
            if failed:
                with parallel.failing_together():
                    session.check()
        with parallel.failing_together():
            session.checkpoints.wait()
        if session.finished and not interrupted:
            session.validate.advise()
        if smoke and not interrupted:
            _check_restored(session.checkpoints, state)
    if smoke and not interrupted:
        for line in smoke_report.lines(
            experiment,
            images=session.data.images,
            validation_images=len(session.data.validation),
            steps=session.progress.step,
            losses=session.meter.losses,
            decoding=session.validate.search,
            metrics=session.validate.metrics,
        ):
            show(line)
    return Outcome(session.progress.step, session.progress.best, interrupted or None)


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
