"""The ``imgcap`` command: parses, calls one function, prints."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from imgcap_jax.decoding_settings import combinations, options_help, split_options
from imgcap_jax.errors import UserError

# Modules that import JAX or TFDS are imported where they are used, so that --help and errors come at once.

_EPILOG = """examples:
  imgcap data prepare scenes
  imgcap train scenes_demo
  imgcap train flickr8k --run runs/mine --decoder.hidden-size 768
  imgcap features flickr8k
  imgcap evaluate runs/flickr8k --split val --beam 3
  imgcap evaluate runs/flickr8k --decode.beam 1 3 5 --decode.length-norm 0 0.7
  imgcap caption photo.jpg holiday/ --run runs/flickr8k
  imgcap caption photo.jpg --run runs/flickr8k --attention
  imgcap caption photo.jpg --run runs/flickr8k --n-best 3 --decode.must frisbee"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for a user's mistake)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    decoding: list[str] = []
    if given[:1] in (["evaluate"], ["caption"]):
        given, decoding = split_options(given, sweep=given[0] == "evaluate")
    options, rest = _parser().parse_known_args(given)
    options.decoding = decoding
    if rest and options.command not in (_train, _features):
        known = re.findall(r"--[a-z][a-z.-]+", options.parser.format_help())
        near = difflib.get_close_matches(rest[0], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "--help after the command lists its options"
        print(f"imgcap: unknown argument {rest[0]}; {hint}", file=sys.stderr)
        return 2
    options.rest = rest
    try:
        code: int = options.command(options)
    except BrokenPipeError:
        return 141
    except UserError as error:
        print(f"imgcap: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"imgcap: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = options.command in (_train, _features, _prepare)
        more = "; the same command goes on from what is saved" if goes_on else ""
        print(f"imgcap: interrupted{more}", file=sys.stderr)
        return 130
    return code


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as all others are told."""

    def error(self, message: str) -> NoReturn:
        print(f"imgcap: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="imgcap",
        description="Image captioning in JAX: train, evaluate, caption.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        add_help=False,
        allow_abbrev=False,
        help="train an experiment; the same command resumes",
        description="Train an experiment. Any field of it can be given as an option after its name, as in "
        "--decoder.hidden-size 768 (imgcap train EXPERIMENT --help lists them).",
    )
    train.set_defaults(command=_train, parser=train)
    train.add_argument("experiment", nargs="?", help="a file such as experiments/flickr8k.py, or its name")
    train.add_argument("--run", type=Path, help="the run's folder (default: runs/<experiment>)")
    train.add_argument("--init-from", type=Path, metavar="RUN", help="start from another run's best weights")
    train.add_argument(
        "--smoke",
        action="store_true",
        help="a check in seconds: few images, two short epochs, in runs/<experiment>_smoke, anew each time",
    )
    train.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,COUNT,INDEX",
        help="train over several hosts, the same command on each, --run on a disk that they share; without a value on "
        "Cloud TPU and Slurm. A stop is heard at the next training.log_steps",
    )
    _add_cache(train)
    train.add_argument("-h", "--help", action="store_true", help="show this and the experiment's fields")

    features = commands.add_parser(
        "features",
        allow_abbrev=False,
        help="compute a frozen encoder's features before training; several processes share the work",
        description="Compute the features that training an experiment would compute first. Given at once in several "
        "processes, on one host or on several with a common --cache, the same command shares the work; stopped, it "
        "goes on where it was. Any field of the experiment can be given as an option, as for imgcap train.",
    )
    features.set_defaults(command=_features, parser=features)
    features.add_argument("experiment", help="a file such as experiments/flickr8k.py, or its name")
    features.add_argument("--splits", default="train,val", help="which splits (default: train,val)")
    _add_cache(features)

    evaluate = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="caption a split and score it, in COCO's format",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{options_help()}\n\nSeveral values make a sweep: every combination is decoded and scored, as in\n"
        "  imgcap evaluate RUN --decode.beam 1 3 5 --decode.length-norm 0 0.7",
    )
    evaluate.set_defaults(command=_evaluate, parser=evaluate)
    evaluate.add_argument("run", type=Path, help="the run's folder")
    evaluate.add_argument("--split", default="val", help="train, val, test, ... (default: val)")
    evaluate.add_argument("--dataset", help="another dataset than the run's")
    evaluate.add_argument(
        "--ensemble",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help="average the words' probabilities with this run too",
    )
    evaluate.add_argument(
        "--floor",
        action="store_true",
        help="also score the captions as those of other photos: what is had without looking",
    )
    evaluate.add_argument("--page", type=Path, metavar="HTML", help="also write a page of images and captions")
    _add_decoding(evaluate)
    _add_cache(evaluate)

    caption = commands.add_parser(
        "caption",
        allow_abbrev=False,
        help="caption photos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=options_help(),
    )
    caption.set_defaults(command=_caption, parser=caption)
    caption.add_argument("photos", nargs="+", type=Path, help="image files, or folders of them")
    caption.add_argument(
        "--run", type=Path, required=True, action="append", help="the run's folder; given again, an ensemble"
    )
    caption.add_argument("--attention", action="store_true", help="draw where the best caption's words looked")
    caption.add_argument(
        "--attention-dir", type=Path, metavar="FOLDER", help="where those pictures go (default: the present folder)"
    )
    caption.add_argument("--json", action="store_true", help="one JSON object a line, with words and log-probabilities")
    _add_decoding(caption)
    _add_cache(caption)

    data = commands.add_parser("data", allow_abbrev=False, help="prepare and look at datasets")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", allow_abbrev=False, help="write a dataset in TFDS's format")
    prepare.set_defaults(command=_prepare, parser=prepare)
    prepare.add_argument("source", help="scenes, coco, or a folder of images with a caption file")
    prepare.add_argument("--name", help="what to call the dataset (default: the folder's name, or scenes)")
    prepare.add_argument("--licence", default="", help="a note on the images' licence, kept with the dataset")
    prepare.add_argument("--source-note", default="", help="where a folder's images come from, kept with the dataset")
    prepare.add_argument("--download-dir", type=Path, help="coco: where its archives are kept")
    prepare.add_argument("--train-scenes", type=int, metavar="N", help="scenes: how many to draw for training")
    _add_data_dir(prepare)
    inspect = actions.add_parser("inspect", allow_abbrev=False, help="counts, lengths, words and a contact sheet")
    inspect.set_defaults(command=_inspect, parser=inspect)
    inspect.add_argument("name", help="a prepared dataset")
    inspect.add_argument("--min-count", type=int, default=5, help="how often a word of the vocabulary has to occur")
    inspect.add_argument("--sheet", type=Path, help="where the contact sheet goes (default: <name>.png)")
    _add_data_dir(inspect)
    return parser


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder of encoder features and compiled programs (default: .cache beside the run)",
    )


def _cache(options: argparse.Namespace, run: Path) -> Path:
    """The cache's folder, with compiled programs kept in it from now on."""
    from imgcap_jax.compilation import cache_compilations

    cache: Path = options.cache or run.parent / ".cache"
    cache_compilations(cache)
    return cache


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, help="where datasets lie (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--beam", type=int, help="beams; 1 is greedy (default: the run's)")
    parser.add_argument("--length-norm", type=float, help="exponent of the length in the ranking (default: the run's)")
    parser.add_argument(
        "--n-best", type=int, metavar="N", help="so many captions an image, with scores (default: the run's)"
    )
    parser.add_argument("--max-words", type=int, help="longest caption (default: the run's)")


def _train(options: argparse.Namespace) -> int:
    from imgcap_jax.experiment_files import find, override, overrides_help

    if options.help:
        options.parser.print_help()
        if options.experiment is not None:
            print("\n" + overrides_help(find(options.experiment)))
        return 0
    if options.experiment is None:
        raise UserError("give an experiment: a file, or the name of one of those in experiments/, as flickr8k")
    experiment = override(find(options.experiment), options.rest)
    from imgcap_jax.experiment import for_smoke
    from imgcap_jax.training.loop import train
    from imgcap_jax.training.parallel import is_first_process, join_processes

    name = Path(options.experiment).stem + ("_smoke" if options.smoke else "")
    if options.smoke and options.run:
        raise UserError(f"--smoke always runs in runs/{name}, anew each time; leave out --run")
    if options.distributed:
        if options.smoke:
            raise UserError("--smoke is for one host; leave out --distributed")
        join_processes(options.distributed)
    folder = options.run or Path("runs") / name
    cache = _cache(options, folder)
    try:
        outcome = train(
            for_smoke(experiment) if options.smoke else experiment,
            folder,
            cache=cache / "features",
            init_from=options.init_from,
            smoke=options.smoke,
        )
    except UserError as error:
        if not options.distributed:
            raise
        # The other processes wait for this one in a collective; only its end tells them.
        print(f"imgcap: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    ended = f"done: {folder}, best validation CIDEr-D {100 * (outcome.best or 0):.1f}"
    if outcome.interrupted:
        ended = f"stopped at step {outcome.step}; the same command resumes"
    if is_first_process():
        print(ended)
    return 128 + outcome.interrupted if outcome.interrupted else 0


def _features(options: argparse.Namespace) -> int:
    from imgcap_jax.experiment_files import find, override
    from imgcap_jax.extraction import extract

    experiment = override(find(options.experiment), options.rest)
    extract(experiment, options.splits.split(","), _cache(options, Path("runs") / "any") / "features")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from imgcap_jax.evaluation import sweep
    from imgcap_jax.report.evaluation import lines, table, write_page
    from imgcap_jax.run import Run

    runs = [Run.load(folder) for folder in (options.run, *options.ensemble)]
    decodings, swept = _decodings(options, runs[0])
    if swept and options.page is not None:
        raise UserError("--page is for one setting; leave it out of a sweep")
    evaluations = []
    for evaluation in sweep(
        runs,
        options.split,
        cache=_cache(options, options.run) / "features",
        dataset=options.dataset,
        decodings=decodings,
        floor=options.floor,
    ):
        print("\n".join(lines(evaluation)), flush=True)
        evaluations.append(evaluation)
    if swept:
        print("\n" + "\n".join(table(evaluations, swept)))
    if options.page is not None:
        write_page(evaluations[0], options.page)
        print(f"page: {options.page}")
    return 0


def _caption(options: argparse.Namespace) -> int:
    from imgcap_jax.captioner import Captioner, caption_files
    from imgcap_jax.run import Run

    runs = [Run.load(folder) for folder in options.run]
    decodings, swept = _decodings(options, runs[0])
    if swept:
        raise UserError(f"--decode.{swept[0]} has several values; a sweep is for imgcap evaluate")
    _cache(options, options.run[0])
    if options.attention_dir is not None and not options.attention:
        raise UserError("--attention-dir says where pictures go; give --attention as well")
    captioner = Captioner(runs, decodings[0], attention=options.attention)
    pictures = (options.attention_dir or Path()) if options.attention else None
    bad = 0
    for line, failed in caption_files(
        captioner,
        options.photos,
        as_json=options.json,
        pictures=pictures,
    ):
        print(line, file=sys.stderr if failed else sys.stdout, flush=True)
        bad += failed
    return 2 if bad else 0


def _decodings(options: argparse.Namespace, run: Any) -> tuple[list[Any], list[str]]:
    """The run's decoding with what the options say, and the names of what is swept."""
    short = {name: getattr(options, name.replace("-", "_")) for name in ("beam", "length-norm", "max-words", "n-best")}
    given = [f"--decode.{name}={value}" for name, value in short.items() if value is not None]
    for option in options.decoding:
        name = option.partition("=")[0].removeprefix("--decode.")
        if short.get(name) is not None:
            raise UserError(f"--{name} and --decode.{name} are the same; give one of them")
    return combinations(run.experiment.decoding, [*given, *options.decoding])


def _prepare(options: argparse.Namespace) -> int:
    from imgcap_jax.data.builders.scenes import SceneSplits
    from imgcap_jax.data.prepare import prepare

    if options.train_scenes is not None and options.source != "scenes":
        raise UserError(f"--train-scenes is for scenes, not for {options.source!r}; leave it out")
    splits = SceneSplits(train=options.train_scenes) if options.train_scenes is not None else None
    prepare(
        options.source,
        name=options.name,
        data_dir=options.data_dir,
        licence=options.licence,
        source=options.source_note,
        download_dir=options.download_dir,
        scenes=splits,
        say=print,
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from imgcap_jax.data.inspect import inspect
    from imgcap_jax.data.sources import open_source
    from imgcap_jax.report.contact_sheet import dataset_sheet

    inspection = inspect(options.name, options.data_dir, min_count=options.min_count)
    print("\n".join(inspection.lines()))
    sheet = options.sheet or Path(f"{options.name}.png")
    dataset_sheet(open_source(options.name, next(iter(inspection.splits)), options.data_dir), sheet)
    print(f"contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
