"""Trains runs that differ in their seed or in numbers of their settings as one program."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from imgcap_jax.data.pipeline import TrainBatches
from imgcap_jax.data.regions import has_ready_regions
from imgcap_jax.data.rows import Batch
from imgcap_jax.errors import UserError, counted
from imgcap_jax.experiment import SEED, Experiment
from imgcap_jax.files import check_name, owning
from imgcap_jax.models.encoders.contract import weights_digest
from imgcap_jax.models.model import split_trained
from imgcap_jax.precision import at_precision, compute_dtype
from imgcap_jax.remote import place
from imgcap_jax.report.attention import sample_picture
from imgcap_jax.run.extraction import uses_store, why_not_stored
from imgcap_jax.run.folder import nothing_left_if_refused
from imgcap_jax.run.hub import run_place
from imgcap_jax.run.mirror import Mirror
from imgcap_jax.session import Session, check_feed, compiling, open_data
from imgcap_jax.terminal import Say, Work, working
from imgcap_jax.train import Outcome
from imgcap_jax.training.feed import DeviceFeed, Feed, HostFeed, device_part, device_shards
from imgcap_jax.training.log import LogTo
from imgcap_jax.training.parallel import DataParallel, MemberParallel
from imgcap_jax.training.population import Column, cannot_differ, merged, with_values
from imgcap_jax.training.signals import StopRequest

_DROPOUT = "decoder.dropout"


@dataclass(frozen=True)
class Variant:
    """A member of a population.

    name: the name of its folder. experiment: what it computes. values: its fields that differ between members, as
    {"optimizer.learning_rate": 1e-3}.
    """

    name: str
    experiment: Experiment
    values: dict[str, float | int]


def train_population(
    variants: Sequence[Variant],
    folder: Path,
    *,
    cache: Path,
    init_from: Path | None = None,
    log_to: LogTo | None = None,
    show: Say = print,
) -> dict[str, Outcome]:
    """Trains each variant in the folder ``folder / name``, all of them in the same steps.

    Each run equals the run that ``train`` would train, to rounding, and can be continued by it. A run that ends early
    (``training.patience``) is not changed any more. Interrupted populations resume; members may have different
    checkpoints.

    Args:
        variants: what to compute.
        folder: the folder of all runs.
        cache: folder of the features of frozen encoders.
        init_from: another run, whose best parameters are the start of all members.
        log_to: the services that get the metrics of each member too.
        show: receives the lines for the user.

    Returns:
        The outcome of each variant, by name.

    Raises:
        UserError: a setting cannot differ between members, or an error of ``train``.
    """
    folder = place(str(folder))
    init_from = None if init_from is None else run_place(str(init_from))
    folders = [folder / variant.name for variant in variants]
    for path in folders:
        check_name(path.absolute())
    _check(variants)
    with ExitStack() as stack:
        mirrors = []
        for path in folders:
            stack.enter_context(owning(path, "training"))
            mirrors.append(stack.enter_context(Mirror(path)))
            stack.enter_context(nothing_left_if_refused(path))
        log_to = replace(log_to or LogTo(), group=folder.absolute().name)
        return _train(variants, folders, mirrors, cache, init_from, log_to, show)


def _check(variants: Sequence[Variant]) -> None:
    """Raises UserError if a field cannot differ. What the training step decides by it is found when it is traced."""
    experiment = variants[0].experiment
    if jax.process_count() > 1:
        raise UserError("--population is for one process; leave out --distributed")
    for field, value in variants[0].values.items():
        if field not in (SEED, _DROPOUT) and field.split(".")[0] not in ("optimizer", "objective"):
            raise UserError(
                f"--population: {field} cannot differ between members; {SEED}, {_DROPOUT} and numbers of optimizer and "
                f"objective can"
            )
        if field != SEED and not isinstance(value, float):
            raise UserError(
                f"--population: {field} is {value!r}, which decides what is computed; only numbers that can have a "
                f"fraction can differ between members"
            )
    check_feed(experiment)
    random = not has_ready_regions(experiment.encoder) and weights_digest(experiment.encoder) is None
    if SEED in variants[0].values and uses_store(experiment) and random:
        raise UserError(
            f"--population: the frozen encoder has random weights, which depend on {SEED}; give its weights file, or "
            f"train these runs one by one"
        )


class _Program(NamedTuple):
    """The compiled training of all members: their states, what the step reads, and the feed."""

    states: Any
    constants: Any
    feed: Feed


def _train(
    variants: Sequence[Variant],
    folders: Sequence[Path],
    mirrors: Sequence[Mirror],
    cache: Path,
    init_from: Path | None,
    log_to: LogTo,
    show: Say,
) -> dict[str, Outcome]:
    experiment, training = variants[0].experiment, variants[0].experiment.training
    parallel, together = DataParallel(training.parallel), MemberParallel(len(variants))
    parallel.check_batch_size(experiment.data.batch_size, experiment.optimizer.accumulate)
    sessions: list[Session] = []

    def drain(seconds: float) -> BaseException | None:
        ends = time.monotonic() + seconds
        return next(filter(None, [session.drain(ends - time.monotonic()) for session in sessions]), None)

    stop = StopRequest(show, drain=drain)
    say = _Lines(show)
    data = open_data(experiment, smoke=False)
    with ExitStack() as stack:
        for variant, path, mirror in zip(variants, folders, mirrors, strict=True):
            session = Session(
                variant.experiment,
                path,
                data,
                parallel,
                stop,
                cache=cache,
                init_from=init_from,
                smoke=False,
                show=partial(say, name=variant.name),
                evaluator=sessions[0].validate.evaluator if sessions else None,
                mirror=mirror,
                log_to=log_to,
                draw=sample_picture,
            )
            sessions.append(stack.enter_context(closing(session)))
            session.to_host()  # the devices get the states of all members as one
        say.opened = True
        sessions[0].validate.evaluator.say = show  # all members share it
        names = ", ".join(variants[0].values)
        show(
            f"a population of {counted(len(variants), 'run')} that differ in {names}, on "
            f"{counted(len(together.devices), 'device')}"
        )
        if len(together.devices) < min(len(parallel.devices), len(variants)):
            all_devices = counted(len(parallel.devices), "device")
            show(f"note: there are {all_devices}; a number of runs that is a multiple of it uses all of them")
        stack.enter_context(stop)
        total, done = sessions[0].total_steps, min(session.progress.step for session in sessions)
        work = stack.enter_context(working("", total, "steps", done=done, say=show))
        works = [Work("", total, "steps", session.progress.step, show) for session in sessions]
        for session, own in zip(sessions, works, strict=True):
            if not sessions[0].validate.interrupted:
                session.start(own)
        interrupted = max(session.validate.interrupted for session in sessions)
        if not interrupted and not all(session.finished for session in sessions):
            program = _program(variants, sessions, together, show, stop)
            with program.feed:
                interrupted = _loop(program, sessions, together, work, stop, [variant.name for variant in variants])
        if not interrupted:
            for session in sessions:
                session.validate.advise()
    return {
        variant.name: Outcome(session.progress.step, session.progress.best, interrupted or None)
        for variant, session in zip(variants, sessions, strict=True)
    }


class _Lines:
    """Shows lines of members: while they are opened, each different line once, and then with the member's name."""

    def __init__(self, show: Say) -> None:
        self.opened = False
        self._show = show
        self._seen: set[str] = set()

    def __call__(self, line: str, *, name: str) -> None:
        if self.opened:
            self._show(f"{name}: {line}")
        elif line not in self._seen:
            self._seen.add(line)
            self._show(line)


def _loop(
    program: _Program,
    sessions: Sequence[Session],
    together: MemberParallel,
    work: Work,
    stop: StopRequest,
    names: Sequence[str],
) -> int:
    """Trains until all members are finished. Returns the signal that ended it, or 0."""
    states, constants, feed = program

    def state_of(number: int) -> Any:
        return sessions[number].setup.parallel.replicate(together.member(states, number))

    while not all(session.finished for session in sessions):
        # Members that are ahead, because the process was killed between their checkpoints, wait for the others.
        step = min(session.progress.step for session in sessions if not session.finished)
        active = [session.progress.step == step and not session.finished for session in sessions]
        ahead = [session.progress.step - step for session in sessions if session.progress.step > step]
        trained = [number for number, is_active in enumerate(active) if is_active]
        limit = min([sessions[trained[0]].limit, *(steps for steps in ahead if steps)])
        states, ran = feed.run(states, (together.put({"active": np.array(active)})["active"], *constants), limit)
        for number in trained:
            columns = {name: Column(values, number) for name, values in ran.metrics.items()}
            sessions[number].add(ran.steps, columns, ran.batches)
        for number in trained:
            if sessions[number].validates:
                sessions[number].validate_now(state_of(number))
                if sessions[number].validate.interrupted:
                    return sessions[number].validate.interrupted
        overdue = any(sessions[number].overdue or sessions[number].failed for number in trained)
        if stop.signal or overdue:
            for number in trained:
                sessions[number].save(state_of(number))
            for number in trained:
                sessions[number].check()
        if stop.signal:
            return stop.signal
        if overdue or any(sessions[number].validates for number in trained):
            for number in trained:  # each has waited for the others
                sessions[number].meter.restart(sessions[number].progress)
        work.update(step + ran.steps, _parts(sessions, names, step + ran.steps))
    return 0


def _parts(sessions: Sequence[Session], names: Sequence[str], step: int) -> list[str]:
    """What the progress of a population shows."""
    losses = [session.meter.losses[-1] for session in sessions if session.meter.losses]
    parts = [f"step {step:,}/{sessions[0].total_steps:,}"]
    if losses:
        parts.append(f"loss {min(losses):.3f} to {max(losses):.3f}")
    best = [(session.progress.best, name) for session, name in zip(sessions, names, strict=True)]
    if known := [(score, name) for score, name in best if score is not None]:
        score, name = max(known)
        parts.append(f"best CIDEr-D {100 * score:.1f} ({name})")
    if finished := sum(session.finished for session in sessions):
        parts.append(f"{finished} finished")
    return parts


def _program(
    variants: Sequence[Variant], sessions: Sequence[Session], together: MemberParallel, show: Say, stop: StopRequest
) -> _Program:
    """The training step of all members, which starts at the first step that a member has to do."""
    experiment, setup = variants[0].experiment, sessions[0].setup
    fields = [field for field in variants[0].values if field != SEED]
    traced = [field for field in fields if field != _DROPOUT]
    graph, constants = setup.graph, [session.constants for session in sessions]
    if _DROPOUT in fields:
        graph, constants = _with_rates(variants, sessions)
    of_constants: list[Any] = [jax.tree.structure(one) for one in constants]
    if any(structure != of_constants[0] for structure in of_constants):
        raise cannot_differ(fields, "members read other things, as the initial parameters with a KL penalty only")
    structures = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), session.state) for session in sessions]
    if any(structure != structures[0] for structure in structures[1:]):
        raise cannot_differ(fields, "parameters or the optimizer state have other shapes")
    joined, shared = merged(constants)
    values = {field: np.array([variant.values[field] for variant in variants], np.float32) for field in traced}

    def step(state: Any, constants: Any, batch: Any) -> tuple[Any, Any]:
        active, values, key, own = constants
        try:
            of_member = with_values(experiment, values)
            transformation = of_member.optimizer.build(setup.steps_per_epoch, sessions[0].total_steps)
            of_setup = replace(setup, graph=graph, transformation=transformation, key=key)
            one_step = at_precision(of_member.objective.make_step(of_setup), compute_dtype(experiment.training.dtype))
            following, metrics = one_step(state, own, batch)
        except jax.errors.JAXTypeError as error:
            if not traced:
                raise
            raise cannot_differ(traced, str(error).splitlines()[0]) from error
        return jax.tree.map(lambda new, old: jax.numpy.where(active, new, old), following, state), metrics

    first = min(session.progress.step for session in sessions if not session.finished)
    rows = [session.batches.rows for session in sessions]
    all_shared = (False, dict.fromkeys(values, False), False, shared)
    compile_step = partial(compiling, show, stop, first)
    feed: Feed
    if device_shards(rows[0], together, show, why_not_stored(experiment)[0]) is None:
        batches = [session.batches for session in sessions]
        for of in batches:
            of.set_state(of.rows.position(first))
        feed = HostFeed(together.compile(step, all_shared), _stacked(batches), together.put, compile_step, first=first)
    else:
        compile_loop = partial(together.compile_loop, step, shared=all_shared)
        feed = DeviceFeed(compile_loop, rows, together, show, compile_step, first=first)
    own = jax.tree.map(
        lambda leaf, is_shared: together.replicate(leaf) if is_shared else together.put({"": leaf})[""], joined, shared
    )
    keys = together.stack([session.setup.key for session in sessions])
    return _Program(together.stack([session.state for session in sessions]), (together.put(values), keys, own), feed)


def _with_rates(variants: Sequence[Variant], sessions: Sequence[Session]) -> tuple[Any, list[Any]]:
    """The graph of models whose dropout rate is an array, and the constants of each member, with its rate."""
    graphs, constants = [], []
    for variant, session in zip(variants, sessions, strict=True):
        rate = jax.numpy.float32(variant.values[_DROPOUT])
        run = replace(session.run, experiment=with_values(variant.experiment, {_DROPOUT: rate}))
        graph, _, frozen = split_trained(run.model(with_encoder=session.data.stores is None))
        graphs.append(graph)
        setup = replace(session.setup, graph=graph, frozen=session.setup.parallel.replicate(frozen))
        constants.append(variant.experiment.objective.constants(setup))
    if any(graph != graphs[0] for graph in graphs):
        raise cannot_differ([_DROPOUT], "the decoder decides by it what it computes")
    return graphs[0], constants


def _stacked(batches: Sequence[TrainBatches]) -> Iterator[Batch]:
    """The batches of all members, each array as [P,...]."""
    for of_members in zip(*batches, strict=True):
        parts = [device_part(batch) for batch in of_members]
        yield {name: np.stack([part[name] for part in parts]) for name in parts[0]}
