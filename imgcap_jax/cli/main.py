"""The ``imgcap`` command: parses the command line, calls one function, prints."""

import argparse
import gc
import io
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from imgcap_jax.accelerators import quiet_libtpu
from imgcap_jax.cli.interruption import lost_process, sigterm_interrupts
from imgcap_jax.cli.parser import build_parser
from imgcap_jax.errors import Terminated, UserError, check_range, counted, printable

_COMPILED_BYTES = 500_000_000  # of compiled programs; a training run needs about 1 MB on a CPU
_SERVED_MEGAPIXELS = 50.0  # of photos of strangers, of which several are decoded at a time
_LOOKED = "looked"  # a file whose time is that of the last look at their sizes
_SECONDS_BETWEEN_LOOKS = 24 * 3600

# Modules that import JAX or TFDS are imported where they are used, so that --help and errors are quick.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for a user's mistake)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as the standard error: lines appear at once, no character fails
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged metadata in images
    quiet_libtpu()
    given = list(sys.argv[1:] if arguments is None else arguments)
    decoding: list[str] = []
    if given[:1] in (["evaluate"], ["caption"], ["compare"], ["calibrate"], ["export"], ["serve"]) and any(
        argument.startswith("--decode.") for argument in given
    ):
        from imgcap_jax.cli.sweeps import split_options

        given, decoding = split_options(given, sweep=given[0] == "evaluate")
    try:
        options, rest = build_parser().parse_known_args(given)
    except BrokenPipeError:  # as in imgcap --help | head
        return 141
    options.decoding = decoding
    options.rest = rest
    options.given = given
    options.alone = arguments is None  # not called by a program that has its own modules and objects
    try:
        if rest and options.command not in ("train", "features", "plan"):
            raise _unknown_argument(rest[0], options.parser, options.command)
        with sigterm_interrupts(_interrupted(options), may_exit=options.alone), _memory_errors(options):
            code: int = _COMMANDS[options.command](options)
    except BrokenPipeError:
        return 141
    except UserError as error:
        print(f"imgcap: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"imgcap: {printable(f'{place}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(_interrupted(options), file=sys.stderr)
        code = 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
        if options.alone:  # JAX crashes if the interpreter shuts down while a computation runs
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if options.alone:
        gc.freeze()  # the interpreter's last collections would take a third of a second
    return code


def _interrupted(options: argparse.Namespace) -> str:
    return f"imgcap: {'; '.join(['interrupted', *_continuation(options)])}"


@contextmanager
def _memory_errors(options: argparse.Namespace) -> Iterator[None]:
    """Turns an error of insufficient memory, of the host or the device, into a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        advice = {
            "train": "use a smaller --data.batch-size",
            "evaluate": "a smaller beam, or fewer samples, helps",
            "report": "use fewer --images",
            "caption": "a smaller beam, fewer samples, or smaller photos help",
        }.get(options.command, "close other programs, or use a machine with more memory")
        if isinstance(error, MemoryError):
            raise UserError(f"not enough memory; {advice}") from error
        jax = sys.modules.get("jax")
        if jax is None or not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = re.search(r"(\d+) bytes", str(error))
        needed = f" ({int(size[1]) / 1e9:.1f} GB needed at once)" if size else ""
        raise UserError(f"not enough memory on the device{needed}; {advice}") from error


def _continuation(options: argparse.Namespace) -> list[str]:
    """What the same command does after an interruption, if that is not obvious."""
    if options.command not in ("train", "ablate", "features", "prepare"):
        return []
    again = getattr(options, "smoke", False)
    if options.command == "prepare":  # only COCO's downloads continue
        again = options.source not in ("coco", "coco_captions")
    return [f"the same command {'starts again' if again else 'resumes'}"]


def _unknown_argument(argument: str, parser: argparse.ArgumentParser, command: str) -> UserError:
    from imgcap_jax.cli.options import option_names, unknown_option

    if not argument.startswith("-"):
        return UserError(f"unexpected argument {argument!r}; {parser.prog} --help lists the arguments")
    known = re.findall(r"--[a-z][a-z.-]+", parser.format_usage())
    if command in ("evaluate", "caption", "compare", "calibrate"):
        from imgcap_jax.decoding.settings import Decoding

        known += option_names(Decoding(), prefix="decode")
    return unknown_option(argument.partition("=")[0], known)


@contextmanager
def _importing(options: argparse.Namespace) -> Iterator[None]:
    """While entered, modules are imported without garbage collections, which take a fifth of the time."""
    if not options.alone or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections skip what has been imported
        gc.enable()


def _keep_compiled() -> None:
    """From here on, JAX keeps compiled programs in the user's own cache, or where JAX's own setting says.

    Never next to a run: JAX executes what it finds there, and the run can be that of somebody else.
    """
    import jax

    from imgcap_jax.files import cache_folder, is_private

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder("xla")
    try:
        private = is_private(folder)
    except OSError:
        return  # no home folder, or a read-only one
    if not private:
        _note(f"{folder} belongs to or can be changed by others, so compiled programs are not kept: chmod 700 {folder}")
        return
    with suppress(OSError):  # another process deletes the same files
        _forget_old_programs(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Also the programs that compile in milliseconds: training has about 60 of them, of 4 KB on average, and starts four
    # seconds sooner with them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _forget_old_programs(folder: Path) -> None:
    """Deletes the compiled programs that were not used for the longest time, if all of them together are too large.

    It looks at most once per day.
    """
    # JAX's own limit needs the package filelock, and fails on a cache that was written without a limit.
    looked = folder / _LOOKED
    if looked.exists() and abs(time.time() - looked.stat().st_mtime) < _SECONDS_BETWEEN_LOOKS:
        return
    looked.touch()
    with os.scandir(folder) as entries:
        programs = [(Path(one.path), one.stat()) for one in entries if one.name.endswith("-cache")]
    size = 0
    for path, found in sorted(programs, key=lambda one: -max(one[1].st_atime, one[1].st_mtime)):
        size += found.st_size
        if size > _COMPILED_BYTES:
            path.unlink(missing_ok=True)


def _features_cache(options: argparse.Namespace, run: Path) -> Path:
    from imgcap_jax.files import cache_folder
    from imgcap_jax.remote import url_of

    if options.cache is None and url_of(run) is not None:
        return cache_folder("features")  # a bucket gets features only if the user says so
    cache: Path = options.cache or run.parent / ".cache"
    return cache / "features"


def _note(text: str) -> None:
    print(f"imgcap: note: {text}", file=sys.stderr)


def _set_largest_image(options: argparse.Namespace) -> None:
    from imgcap_jax.data import image_files

    if options.max_megapixels is not None:
        if not 0 < options.max_megapixels < float("inf"):
            raise UserError(f"--max-megapixels is {options.max_megapixels:g}; it must be positive")
        image_files.MAX_MEGAPIXELS = options.max_megapixels


def _load_runs(folders: Sequence[Path], options: argparse.Namespace) -> list[Any]:
    """The runs, after the code that the user named, with their data and weights where the user says."""
    from imgcap_jax.cli.experiments import shipped_names
    from imgcap_jax.remote import shown
    from imgcap_jax.run.finder import is_run
    from imgcap_jax.run.folder import RUNS, Run, use_data_dir, use_weights
    from imgcap_jax.run.mirror import pull
    from imgcap_jax.user_code import load_all_code

    for folder in folders:
        pull(folder)
        name = folder.name.removesuffix(".py")
        trained = is_run(folder) or is_run(RUNS / name)  # the error of Run.load names the latter
        if not trained and (folder.suffix == ".py" or name in shipped_names()):
            experiment = folder if folder.suffix == ".py" else name
            raise UserError(f"{shown(folder)} is not a run; train the experiment first: imgcap train {experiment}")
    load_all_code(options.code)
    runs = use_weights([Run.load(folder) for folder in folders], options.weights)
    notes = [note for run in runs for note in run.code_changes()]
    if options.command in ("evaluate", "compare", "calibrate"):
        # An ensemble reads its images with the settings of its first run.
        for number in range(1 if getattr(options, "ensemble", []) else len(runs)):
            runs[number], note = use_data_dir(runs[number], options.data_dir)
            notes += [note] if note else []
    for note in dict.fromkeys(notes):
        _note(note)
    return runs


def _train(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.experiments import find
    from imgcap_jax.cli.options import options_help, override

    if options.help:
        options.parser.print_help()
        if options.experiment is not None:
            print("\n" + options_help(find(options.experiment), command=f"imgcap train {options.experiment}"))
        return 0
    if options.experiment is None:
        raise UserError("no experiment; give a Python file, or a name such as flickr8k")
    from imgcap_jax.user_code import load_all_code

    load_all_code(options.code)
    experiment = override(find(options.experiment), options.rest)
    from imgcap_jax.experiment import for_smoke
    from imgcap_jax.run.folder import RUNS
    from imgcap_jax.train import train
    from imgcap_jax.training.log import LogTo
    from imgcap_jax.training.parallel import is_first_process, join_processes
    from imgcap_jax.training.writers.find import find_writers

    log_to = LogTo(find_writers(options.log))
    name = Path(options.experiment).stem + ("_smoke" if options.smoke else "")
    if options.smoke and options.run:
        raise UserError(f"--smoke always trains in {RUNS / name}, from scratch; leave out --run")
    if options.distributed:
        if options.smoke:
            raise UserError("--smoke is for one host; leave out --distributed")
        join_processes(options.distributed)
    folder = options.run or RUNS / name
    _keep_compiled()
    if options.population is not None:
        return _train_population(options, experiment, options.run or RUNS / f"{name}_population", log_to)
    with _ending_together(options), _memory_errors(options):
        outcome = train(
            for_smoke(experiment) if options.smoke else experiment,
            folder,
            cache=_features_cache(options, folder),
            init_from=options.init_from,
            smoke=options.smoke,
            log_to=log_to,
        )
    if is_first_process():
        print("\n".join(_after(options, experiment, folder, outcome)))
    return 128 + outcome.interrupted if outcome.interrupted else 0


def _train_population(options: argparse.Namespace, experiment: Any, folder: Path, log_to: Any) -> int:
    from imgcap_jax.cli.next_commands import after_training
    from imgcap_jax.cli.populations import results, variants
    from imgcap_jax.population import train_population
    from imgcap_jax.remote import shown, url_of
    from imgcap_jax.run.finder import is_run

    for given, option in ((options.smoke, "--smoke"), (options.distributed, "--distributed")):
        if given:
            raise UserError(f"--population trains on one host, and in full; leave out {option}")
    if is_run(folder):
        raise UserError(
            f"{shown(folder)} is a run; the members of a population are runs in a folder: choose another --run"
        )
    members = variants(experiment, options.population, options.rest)
    with _memory_errors(options):
        outcomes = train_population(
            members, folder, cache=_features_cache(options, folder), init_from=options.init_from, log_to=log_to
        )
    interrupted = max(outcome.interrupted or 0 for outcome in outcomes.values())
    if interrupted:
        step = min(outcome.step for outcome in outcomes.values())
        print("; ".join([f"stopped at step {step}", *_continuation(options)]))
        return 128 + interrupted
    best = max(members, key=lambda member: outcomes[member.name].best or 0.0)
    print("\n".join(results(members, outcomes)))
    evaluated = folder if url_of(folder) is None else folder / best.name  # folders in buckets are not listed
    next_commands = after_training(best.experiment, evaluated, code=options.code, cache=options.cache)
    print(f"next: {next_commands[0]}")
    print(f"      {after_training(best.experiment, folder, code=options.code, cache=options.cache)[-1]}")
    return 0


@contextmanager
def _ending_together(options: argparse.Namespace) -> Iterator[None]:
    """Ends the process at a UserError if there are others: they wait for it in a collective, and end when it does.

    If another process has ended, this one ends as if it had received SIGTERM, so that scripts resume both.
    """
    try:
        yield
    except (UserError, RuntimeError, ValueError) as error:
        lost = lost_process(error)
        if not options.distributed or not (lost or isinstance(error, UserError)):
            raise
        line = "; ".join([lost, *_continuation(options)]) if lost else printable(str(error))
        print(f"imgcap: {line}", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGTERM if lost else 2)


def _after(options: argparse.Namespace, experiment: Any, folder: Path, outcome: Any) -> list[str]:
    """How training ended, and the commands to give next."""
    from imgcap_jax.cli.next_commands import after_smoke, after_training
    from imgcap_jax.remote import shown

    if outcome.interrupted:
        return ["; ".join([f"stopped at step {outcome.step}", *_continuation(options)])]
    if options.smoke:
        return [f"the path works; now run: {after_smoke(options.given)}"]
    evaluate, *others = after_training(experiment, folder, code=options.code, cache=options.cache)
    ended = f"done: {shown(folder)}, best validation CIDEr-D {100 * (outcome.best or 0):.1f}"
    return [ended, f"next: {evaluate}", *(f"      {command}" for command in others)]


def _ablate(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.ablate import ablate
    from imgcap_jax.run.folder import RUNS

    folder = options.run or RUNS / Path(options.study).stem
    with _memory_errors(options):
        return ablate(options, folder, _features_cache(options, folder), _keep_compiled)


def _features(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.experiments import find
    from imgcap_jax.cli.options import override
    from imgcap_jax.run.extraction import extract
    from imgcap_jax.run.folder import RUNS

    experiment = override(find(options.experiment), options.rest)
    _keep_compiled()
    extract(experiment, options.splits.split(","), _features_cache(options, RUNS / "any"))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.plan import plan

    return plan(options)


def _runs(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.runs import runs

    return runs(options)


def _evaluate(options: argparse.Namespace) -> int:
    with _importing(options):
        from imgcap_jax.cli.compare import members_of
        from imgcap_jax.cli.evaluate import check_members, evaluate_members
        from imgcap_jax.files import check_writable
        from imgcap_jax.report.evaluation import brief, lines, remarks, table, write_page, written
        from imgcap_jax.run.evaluation import sweep
        from imgcap_jax.training.parallel import is_first_process, join_processes

    if options.distributed:
        join_processes(options.distributed)
    with _ending_together(options):
        folders = members_of(options.run)
        if folders != [options.run]:
            check_members(options)
        runs = _load_runs((*folders, *options.ensemble), options)
        decodings, swept = _decodings(options, runs[0])
        if folders != [options.run]:
            _keep_compiled()
            given = decodings[0] if _decodes(options) else None
            return evaluate_members(runs, options, given, swept, lambda run: _features_cache(options, run.folder))
        if swept and options.page is not None:
            raise UserError("--page needs a single setting; leave it out of a sweep")
        if options.page is not None:
            check_writable(options.page)
        _keep_compiled()
        evaluations = []
        for evaluation in sweep(
            runs,
            options.split,
            cache=_features_cache(options, options.run),
            dataset=options.dataset,
            decodings=decodings,
            floor=options.floor,
            examples=10 if options.page is not None else 0,
        ):
            evaluations.append(evaluation)
            if is_first_process():
                print(brief(evaluation) if swept else "\n".join(lines(evaluation)), flush=True)
    if not is_first_process():
        return 0
    if swept:
        print("\n".join(["", *table(evaluations, swept), "", *remarks(evaluations)]))
    print("\n".join(written(evaluations)))
    if options.page is not None:
        write_page(evaluations[0], options.page)
        print(f"page: {options.page}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.compare import check, members_of
    from imgcap_jax.report.comparison import lines
    from imgcap_jax.run.comparison import compare

    check(options)
    folders = [members_of(folder) for folder in (options.a, options.b)]
    runs = _load_runs([run for side in folders for run in side], options)
    decoding = _one_decoding(options, runs[0])
    _keep_compiled()
    sides = runs[: len(folders[0])], runs[len(folders[0]) :]
    found = compare(
        *sides,
        options.split,
        cache=lambda run: _features_cache(options, run.folder),
        decoding=decoding if _decodes(options) else None,
        names=(options.a, options.b),
    )
    print("\n".join(lines(found, options.captions)))
    if options.json is not None:
        found.write(options.json)
        print(f"written: {options.json}")
    return 0


def _average(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.compare import members_of
    from imgcap_jax.remote import shown
    from imgcap_jax.run.averaging import average

    runs = _load_runs([run for folder in options.runs for run in members_of(folder)], options)
    average(runs, options.run)
    print(f"{shown(options.run)}: the mean of {counted(len(runs), 'run')}")
    print(f"next: {shlex.join(['imgcap', 'evaluate', shown(options.run), '--split', 'val'])}")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.serve import check, serve

    check(options)
    if options.max_megapixels is None:
        options.max_megapixels = _SERVED_MEGAPIXELS
    _set_largest_image(options)
    with _importing(options):
        from imgcap_jax.captioner import Captioner
        from imgcap_jax.models.decoders.contract import has_attention
        from imgcap_jax.run.folder import shipped_model

    runs = _load_runs(options.run or [shipped_model()], options)
    decoding = _one_decoding(options, runs[0])
    _keep_compiled()
    attention = all(has_attention(run.experiment.decoder, run.experiment.encoder.region_size) for run in runs)
    return serve(Captioner(runs, decoding, attention=attention and len(runs) == 1), options)


def _calibrate(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.sharing import calibrate

    (run,) = _load_runs([options.run], options)
    decoding = _one_decoding(options, run)
    _keep_compiled()
    return calibrate(run, decoding, _features_cache(options, run.folder), options)


def _push(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.sharing import push

    (run,) = _load_runs([options.run], options)
    return push(run, options)


def _pull(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.sharing import pull

    return pull(options)


def _export(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.sharing import export, opened

    with opened(options.run) as folder:
        (run,) = _load_runs([folder], options)
        decoding = _one_decoding(options, run)
        return export(run, decoding, options)


def _caption(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.caption import caption, check
    from imgcap_jax.data.photo_files import photo_files

    _set_largest_image(options)
    check(options)
    # Before the model is loaded, in case there are none.
    files = photo_files(options.photos, recursive=options.recursive)
    with _importing(options):
        from imgcap_jax.captioner import Captioner
        from imgcap_jax.run.folder import shipped_model
        from imgcap_jax.terminal import on_terminal, working

    runs = _load_runs(options.run or [shipped_model()], options)
    decoding = _one_decoding(options, runs[0])
    _keep_compiled()
    with working("loading the model", shown=not on_terminal()):
        captioner = Captioner(runs, decoding, attention=options.attention)
    return caption(captioner, files, options)


def _one_decoding(options: argparse.Namespace, run: Any) -> Any:
    """The run's decoding settings changed by the options, for a command that does not sweep."""
    decodings, swept = _decodings(options, run)
    if swept:
        raise UserError(f"--decode.{swept[0]} has several values; only imgcap evaluate sweeps")
    return decodings[0]


def _decodings(options: argparse.Namespace, run: Any) -> tuple[list[Any], list[str]]:
    """The run's decoding settings changed by the options, and the names of the fields that are swept."""
    short = _short_decoding(options)
    given = [f"--decode.{name}={value}" for name, value in short.items() if value is not None]
    for option in options.decoding:
        name = option.partition("=")[0].removeprefix("--decode.").replace("_", "-")
        if short.get(name) is not None:
            raise UserError(f"--{name} and --decode.{name} are the same option; give one of them")
    if not given and not options.decoding:
        return [run.experiment.decoding], []
    from imgcap_jax.cli.sweeps import combinations

    try:
        decodings, swept = combinations(run.experiment.decoding, [*given, *options.decoding])
    except UserError as error:
        message = str(error)
        for name in (name for name, value in short.items() if value is not None):
            message = message.replace(f"--decode.{name} ", f"--{name} ")
        raise UserError(message) from error
    widest, before = max(decodings, key=lambda one: one.beam), run.experiment.decoding.beam
    if widest.beam > before and not any(option.startswith("--decode.beam=") for option in [*given, *options.decoding]):
        _note(f"beam raised from {before} to {widest.beam}, because n-best is {widest.n_best}")
    return decodings, swept


def _decodes(options: argparse.Namespace) -> bool:
    """Whether a decoding option is given."""
    return bool(options.decoding) or any(value is not None for value in _short_decoding(options).values())


def _short_decoding(options: argparse.Namespace) -> dict[str, float | None]:
    """The short forms of decoding options; None if they are not given."""
    return {name: getattr(options, name.replace("-", "_")) for name in ("beam", "length-norm", "max-words", "n-best")}


def _prepare(options: argparse.Namespace) -> int:
    from imgcap_jax.data.prepare import prepare
    from imgcap_jax.data.scenes.builder import SceneSplits

    _set_largest_image(options)
    if options.train_scenes is not None and options.source != "scenes":
        raise UserError(f"--train-scenes has no effect on {options.source!r}; leave it out")
    splits = None
    if options.train_scenes is not None:
        check_range("--train-scenes", options.train_scenes, at_least=1, at_most=9_999_999)
        splits = SceneSplits(train=options.train_scenes)
    folder = prepare(
        options.source,
        name=options.name,
        data_dir=options.data_dir,
        licence=options.licence,
        source=options.source_note,
        images=options.images,
        annotations=options.annotations,
        split_file=options.split_file,
        download_dir=options.download_dir,
        scenes=splits,
        say=print,
    )
    name = folder.parent.name
    print(f"next: {shlex.join(['imgcap', 'data', 'inspect', name, *_same_data_dir(options)])}")
    return 0


def _same_data_dir(options: argparse.Namespace) -> list[str]:
    from imgcap_jax.remote import shown

    return [] if options.data_dir is None else ["--data-dir", shown(options.data_dir)]


def _inspect(options: argparse.Namespace) -> int:
    from imgcap_jax.data.inspect import inspect
    from imgcap_jax.data.sources import check_dataset, describe, open_source
    from imgcap_jax.files import check_writable
    from imgcap_jax.report.contact_sheet import dataset_sheet

    if options.check:
        if damaged := check_dataset(options.name, options.data_dir):
            print("\n".join(damaged))
            files = counted(len(damaged), "damaged file")
            raise UserError(f"{options.name}: {files}; delete its folder and prepare the dataset again")
        print(f"{options.name}: not damaged")
        return 0
    check_range("--min-count", options.min_count, at_least=1)
    sheet = options.sheet or Path(f"{options.name}.png")
    describe(options.name, options.data_dir)  # a wrong name is reported first
    check_writable(sheet)
    tokenizer = _tokenizer(options)
    inspection = inspect(options.name, options.data_dir, min_count=options.min_count, tokenizer=tokenizer)
    print("\n".join(inspection.lines()))
    dataset_sheet(open_source(options.name, next(iter(inspection.splits)), options.data_dir), sheet)
    print(f"contact sheet: {sheet}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from imgcap_jax.data.catalogue import list_datasets
    from imgcap_jax.data.sources import default_data_dir
    from imgcap_jax.report.datasets import lines

    data_dir = options.data_dir or default_data_dir()
    print("\n".join(map(printable, lines(list_datasets(data_dir), data_dir))))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.doctor import doctor

    return doctor(data_dir=options.data_dir, as_json=options.json)


def _tokenizer(options: argparse.Namespace) -> Any:
    """The tokeniser that the user named, after the code that defines it."""
    from imgcap_jax.tokenizers import find_tokenizer
    from imgcap_jax.user_code import load_all_code

    load_all_code(options.code)
    return find_tokenizer(options.tokenizer)


def _score(options: argparse.Namespace) -> int:
    if options.captions.suffix.lower() == ".csv" and not options.judgements:
        raise UserError(f"{options.captions} is a CSV file; captions are JSON. For human ratings, add --judgements")
    if options.judgements:
        from imgcap_jax.cli.judgements import judge

        return judge(options, _tokenizer(options))
    from imgcap_jax.metrics.score_files import score_files
    from imgcap_jax.report.scores import lines

    report = score_files(
        options.captions,
        options.references,
        compare=options.compare,
        mbr=_other_systems(options),
        part=_part(options.images),
        idf=options.idf,
        training=options.training,
        samples=options.samples,
        with_spice=options.spice,
        with_objects=options.objects,
        instances=options.instances,
        tokenizer=_tokenizer(options),
        bootstrap=options.bootstrap,
        output=options.json,
    )
    print("\n".join(lines(report)))
    if options.json is not None:
        report.write(options.json)
        print(f"scores per image: {options.json}")
    return 0


def _part(text: str | None) -> slice:
    """The places of --images. Raises UserError if they are not FIRST:END."""
    found = re.fullmatch(r"(\d*):(\d*)", text or ":")
    if found is None:
        raise UserError(f"--images is {text!r}; it must be FIRST:END, such as 0:500, :500 or 500:")
    return slice(*(int(number) if number else None for number in found.groups()))


def _other_systems(options: argparse.Namespace) -> Any:
    """The systems of --mbr; None without it."""
    from imgcap_jax.metrics.score_files import OtherSystems

    if options.mbr is None:
        for value, option in ((options.mbr_bleu, "--mbr-bleu"), (options.mbr_output, "--mbr-output")):
            if value is not None:
                raise UserError(f"{option} requires --mbr: add other systems' captions, or remove {option}")
        return None
    check_range("--mbr-bleu", options.mbr_bleu or 0.0, at_least=0)
    return OtherSystems(options.mbr, options.mbr_bleu or 0.0, options.mbr_output)


def _report(options: argparse.Namespace) -> int:
    from imgcap_jax.cli.report import check, folders_of, report

    check(options)
    found = folders_of(options.runs)
    runs = _load_runs(list(found), options)
    _keep_compiled()
    given = list(found.values())
    return report(runs, given, [_features_cache(options, folder) for folder in given], options)


_COMMANDS = {
    "train": _train,
    "ablate": _ablate,
    "features": _features,
    "plan": _plan,
    "runs": _runs,
    "evaluate": _evaluate,
    "compare": _compare,
    "average": _average,
    "caption": _caption,
    "serve": _serve,
    "calibrate": _calibrate,
    "export": _export,
    "push": _push,
    "pull": _pull,
    "score": _score,
    "report": _report,
    "prepare": _prepare,
    "inspect": _inspect,
    "list": _list,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
