"""The arguments of the ``imgcap`` command: one function per command."""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from imgcap_jax import __version__
from imgcap_jax.data.photo_files import photo_path
from imgcap_jax.errors import UserError
from imgcap_jax.files import check_name, local_path
from imgcap_jax.remote import place

_EPILOG = """examples:
  imgcap doctor
  imgcap data prepare scenes
  imgcap data list
  imgcap train scenes_demo
  imgcap train flickr8k --run runs/mine --decoder.hidden-size 768
  imgcap train flickr8k_scst --init-from runs/flickr8k
  imgcap train my_experiment.py --smoke
  imgcap train scenes --population training.seed=0..7
  imgcap ablate flickr8k_decoders --dry-run
  imgcap features flickr8k
  imgcap plan coco --topology v5e:4x4
  imgcap runs --watch
  imgcap evaluate runs/flickr8k --split val --beam 3
  imgcap evaluate runs/flickr8k --decode.beam 1 3 5 --decode.length-norm 0 0.7
  imgcap compare runs/flickr8k runs/flickr8k_scst
  imgcap average runs/flickr8k_scst_population --run runs/flickr8k_soup
  imgcap calibrate runs/flickr8k_coco --dataset flickr8k --dataset coco_subset
  imgcap caption photo.jpg holiday/
  imgcap caption -r photos/ --csv captions.csv --html captions.html
  imgcap caption photo.jpg holiday/ --run runs/flickr8k
  imgcap caption photo.jpg --run runs/flickr8k --attention
  imgcap caption photo.jpg --run runs/flickr8k --n-best 3 --decode.must frisbee
  imgcap serve
  imgcap export runs/flickr8k_soup my_model
  imgcap push runs/flickr8k_soup me/my_model
  imgcap caption photo.jpg --run hf://me/my_model
  imgcap score captions.json references.json --compare other.json
  imgcap score a.json references.json --mbr b.json c.json --training references_train.json
  imgcap score captions.json references.json --objects
  imgcap score --judgements ratings.csv references.json
  imgcap report runs/flickr8k runs/flickr8k_scst"""

Commands = Any  # argparse's type has no public name


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        print(f"imgcap: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


class _ExamplesHelp(argparse.HelpFormatter):
    """Help with a description that is wrapped, and examples that are not."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


class _DecodingHelp(argparse.Action):
    """``--help`` of the commands with decoding options, which are listed too."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this and the decoding options")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from imgcap_jax.cli.options import options_help
        from imgcap_jax.cli.sweeps import PREFIX
        from imgcap_jax.decoding.settings import Decoding

        parser.print_help()
        print("\nDecoding options, with the defaults of an experiment that sets none of them:\n")
        print(options_help(Decoding(), prefix=PREFIX, command=parser.prog))
        parser.exit()


class _Version(argparse.Action):
    """``--version``. The version of JAX is read from its metadata, because importing it takes a second."""

    def __init__(self, option_strings: Sequence[str], **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show versions and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"imgcap_jax {__version__} (Python {platform.python_version()}, jax {version('jax')})")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line. The option ``command`` names the command, ``parser`` is its parser."""
    parser = _Parser(
        prog="imgcap",
        description="Image captioning in JAX: train, evaluate, caption.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    adders = (_add_train, _add_ablate, _add_features, _add_plan, _add_runs, _add_evaluate, _add_compare, _add_average)
    for add in (
        *adders,
        _add_calibrate,
        _add_caption,
        _add_serve,
        _add_export,
        _add_push,
        _add_pull,
        _add_score,
        _add_report,
    ):
        add(commands)
    data = commands.add_parser("data", allow_abbrev=False, help="prepare, inspect and list datasets")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_prepare(actions)
    _add_inspect(actions)
    _add_list(actions)
    _add_doctor(commands)
    return parser


def _path(text: str) -> Path:
    """The type of options that name a local folder or file."""
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _photo(text: str) -> Path:
    """The type of arguments that name a photo, or a folder of photos."""
    try:
        return photo_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _folder(text: str) -> Path:
    """The type of options that name a folder, which can be in a bucket, and whose path is written into files."""
    try:
        path = place(text)
        check_name(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def _run(text: str) -> Path:
    """The type of options that name a trained run, which can be in a bucket or on the Hugging Face Hub."""
    from imgcap_jax.run.hub import run_place

    try:
        path = run_place(text)
        check_name(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def _add_command(commands: Commands, name: str, **options: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, allow_abbrev=False, **options)
    parser.set_defaults(command=name, parser=parser)
    return parser


def _add_train(commands: Commands) -> None:
    train = _add_command(
        commands,
        "train",
        add_help=False,
        help="train an experiment; the same command resumes",
        description="Train an experiment. Every field of it can be set by an option after its name, as in "
        "--decoder.hidden-size 768 (imgcap train EXPERIMENT --help lists them).",
    )
    train.add_argument("experiment", nargs="?", help="a Python file, or a name such as flickr8k")
    train.add_argument(
        "--run", type=_folder, help="the run's folder, also gs://BUCKET/FOLDER (default: runs/<experiment>)"
    )
    train.add_argument("--init-from", type=_run, metavar="RUN", help="start from the best parameters of another run")
    train.add_argument(
        "--smoke",
        action="store_true",
        help="a check in a minute or two: few images, two epochs, in runs/<experiment>_smoke, always from scratch",
    )
    train.add_argument(
        "--population",
        metavar="FIELD=VALUES",
        help="train several runs as one program, each in its own folder in --run (default: "
        "runs/<experiment>_population): training.seed=0..7, or values of decoder.dropout or of a number of optimizer "
        "or objective, as 'optimizer.learning_rate=1e-3,2e-3' (several fields, separated by blanks: all combinations)",
    )
    train.add_argument(
        "--log",
        action="append",
        default=[],
        metavar="SERVICE",
        help="also send metrics and sample captions to wandb, trackio or mlflow (pip install SERVICE), or to "
        "MODULE:CLASS of your own with --code; comma-separated, or repeated. A failing service does not stop training",
    )
    _add_distributed(train, "train", " A stop signal takes effect at the next training.log_steps")
    _add_code(train)
    _add_cache(train)
    train.add_argument("-h", "--help", action="store_true", help="show this and the fields of the experiment")


def _add_ablate(commands: Commands) -> None:
    ablate = _add_command(
        commands,
        "ablate",
        help="train the runs of a study and write a table of differences with intervals; the same command resumes",
        description="Train a study: a base experiment, factors that are changed, and seeds (docs/ablations.md). Each "
        "run has its own folder in --run. Finished runs are skipped, interrupted ones resume. The table is written "
        "into that folder as Markdown, LaTeX, CSV and JSON, with a plot. The exit code is 2 if a run failed; the next "
        "call tries it again.",
        formatter_class=_ExamplesHelp,
        epilog="examples:\n"
        "  imgcap ablate my_study.py --dry-run\n"
        "  imgcap ablate my_study.py\n"
        "  imgcap ablate my_study.py --jobs 4 --devices 0,1,2,3\n"
        "  imgcap ablate flickr8k_self_critical --init-from runs/flickr8k",
    )
    ablate.add_argument("study", help="a Python file, or the name of a study that comes with the package")
    ablate.add_argument("--run", type=_folder, help="the folder of all runs (default: runs/<study>)")
    ablate.add_argument("--init-from", type=_run, metavar="RUN", help="start all runs from the best parameters of RUN")
    ablate.add_argument(
        "--dry-run", action="store_true", help="say what would run and, from a few timed steps, how long"
    )
    ablate.add_argument(
        "--together",
        type=int,
        metavar="N",
        help="the largest number of runs that are trained as one program, if they differ in seeds or in numbers of "
        "optimizer, objective and dropout only; 1: one after another (default: 1 on CPUs, 8 on accelerators)",
    )
    ablate.add_argument("--jobs", type=int, default=1, metavar="N", help="train in N processes at a time (default: 1)")
    ablate.add_argument(
        "--devices", metavar="LIST", help="the accelerators to use, as 0,1,2,3; they are divided among the jobs"
    )
    ablate.add_argument(
        "--shard", metavar="I/N", help="train the I-th of N parts, for several machines with a common folder"
    )
    ablate.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # of this number
    _add_code(ablate)
    _add_cache(ablate)


def _add_features(commands: Commands) -> None:
    features = _add_command(
        commands,
        "features",
        help="compute a frozen encoder's features before training; several processes share the work",
        description="Compute the features that training an experiment would compute first. Run in several processes, "
        "on one host or on several with a common --cache, the same command shares the work. After an interruption it "
        "continues. Every field of the experiment can be set by an option, as for imgcap train.",
    )
    features.add_argument("experiment", help="a Python file, or a name such as flickr8k")
    features.add_argument("--splits", default="train,val", help="comma-separated splits (default: train,val)")
    _add_cache(features)


def _add_plan(commands: Commands) -> None:
    plan = _add_command(
        commands,
        "plan",
        add_help=False,
        help="memory, collectives and time of an experiment on a TPU slice or on this machine, without running it",
        description="Compile the training step, the validation search and the encoder of an experiment for a TPU slice "
        'that need not be present (pip install -c constraints.txt "jax[tpu]"), or for this machine, and print what '
        "they need and an estimate of their time. Nothing is run. Every field of the experiment can be set by an "
        "option, as for imgcap train.",
    )
    plan.add_argument("experiment", nargs="?", help="a Python file, or a name such as coco")
    plan.add_argument(
        "--topology",
        default="local",
        help="a TPU generation and the shape of a slice (v5e:4x4, v6e:2x2, v5p:2x2x1), a type of Google Cloud "
        "(v5litepod-16), or local (default)",
    )
    plan.add_argument(
        "--images", type=int, metavar="N", help="training images (default: those of the dataset, prepared or published)"
    )
    plan.add_argument(
        "--vocabulary", type=int, metavar="N", help="words (default: those of the dataset, prepared or published)"
    )
    plan.add_argument(
        "--words", type=float, default=10.4, metavar="X", help="mean words per caption (default: 10.4, those of COCO)"
    )
    plan.add_argument(
        "--programs",
        metavar="NAMES",
        help="comma-separated: training, search, encoder (default: all). Each takes minutes to compile",
    )
    plan.add_argument("--json", type=_path, metavar="FILE", help="also write all figures")
    _add_code(plan)
    plan.add_argument("-h", "--help", action="store_true", help="show this and the fields of the experiment")


def _add_runs(commands: Commands) -> None:
    from imgcap_jax.cli.runs import SORTS

    runs = _add_command(
        commands,
        "runs",
        help="list runs with status, epoch, best score, last change and size",
        description="List the runs in a folder and in the folders below it, such as populations and studies. Status: "
        "training (a process on a host that shares the folder's locks trains it), finished, interrupted (the same "
        "command resumes it), failed (the loss was not finite), no checkpoint, or damaged.",
    )
    runs.add_argument("folder", nargs="?", type=_folder, help="a folder of runs (default: runs)")
    runs.add_argument("--watch", action="store_true", help="refresh every two seconds, until Ctrl-C")
    runs.add_argument("--sort", choices=SORTS, default="name", help="default: name; age: the last changed first")
    runs.add_argument(
        "--json", action="store_true", help="print JSON; best is from 0 to 10, updated in seconds of 1970"
    )


def _add_evaluate(commands: Commands) -> None:
    evaluate = _add_command(
        commands,
        "evaluate",
        add_help=False,
        help="caption a split and score it, in COCO's format",
        description="Caption a split with the best parameters of a run, or of an ensemble, and score the captions.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Several values of a decoding option make a sweep: every combination is decoded and scored, as in\n"
        "  imgcap evaluate RUN --decode.beam 1 3 5 --decode.length-norm 0 0.7\n"
        "A text (prefix, must) is swept by repeating its option.",
    )
    evaluate.add_argument(
        "run", type=_run, help="the run's folder, or a folder of runs, such as a population: evaluates each"
    )
    evaluate.add_argument("--split", default="val", help="train, val, test, ... (default: val)")
    evaluate.add_argument("--dataset", help="a dataset other than the run's")
    evaluate.add_argument(
        "--ensemble",
        type=_run,
        action="append",
        default=[],
        metavar="RUN",
        help="average the word probabilities with those of this run; can be repeated",
    )
    evaluate.add_argument(
        "--floor",
        action="store_true",
        help="also score each caption against the references of another image: the score without seeing the image",
    )
    evaluate.add_argument(
        "--page",
        type=_path,
        metavar="HTML",
        help="also write a page of scores, and of ten images with captions and attention",
    )
    _add_decoding(evaluate)
    _add_code(evaluate)
    _add_cache(evaluate)
    _add_distributed(evaluate, "evaluate")
    _add_weights(evaluate)
    _add_data_dir(evaluate, "that of the run if it exists, or else ")


def _add_compare(commands: Commands) -> None:
    compare = _add_command(
        commands,
        "compare",
        add_help=False,
        help="compare two runs, or two folders of runs with several seeds",
        description="Compare two runs: the settings in which they differ, their scores on a split with intervals and "
        "p-values, training time and size, and the captions that differ most. Stored captions are used if they are up "
        "to date; otherwise the split is captioned first. If both are folders of runs that differ in their seeds, such "
        "as populations, means over seeds are compared.",
    )
    compare.add_argument("a", type=_run, metavar="A", help="a run, or a folder of runs that differ in training.seed")
    compare.add_argument("b", type=_run, metavar="B", help="the other one; differences are B - A")
    compare.add_argument("--split", default="val", help="train, val, test, ... (default: val)")
    compare.add_argument(
        "--captions", type=int, default=3, metavar="N", help="captions that are shown in each direction (default: 3)"
    )
    compare.add_argument("--json", type=_path, metavar="FILE", help="also write everything, with scores per image")
    _add_decoding(compare)
    _add_code(compare)
    _add_cache(compare)
    _add_weights(compare)
    _add_data_dir(compare, "those of the runs if they exist, or else ")


def _add_average(commands: Commands) -> None:
    average = _add_command(
        commands,
        "average",
        help="average the parameters of runs that started from the same run",
        description="Write a run with the mean of the best parameters of several runs, such as seeds of self-critical "
        "training from one start (a model soup). It captions as fast as one of them.",
    )
    average.add_argument("runs", nargs="+", type=_run, metavar="RUN", help="runs, or folders of runs")
    average.add_argument("--run", type=_folder, required=True, metavar="NEW", help="the folder of the new run")
    _add_code(average)
    _add_weights(average)


def _add_caption(commands: Commands) -> None:
    caption = _add_command(
        commands,
        "caption",
        add_help=False,
        help="caption photos",
        description="Caption photos with the model that comes with imgcap_jax, with the best parameters of a run, or "
        "with an ensemble.",
    )
    caption.add_argument("photos", nargs="+", type=_photo, help="image files, or folders of them")
    _add_model(caption)
    caption.add_argument("--attention", action="store_true", help="draw the attention of each word of the best caption")
    caption.add_argument(
        "--attention-dir", type=_path, metavar="FOLDER", help="folder of these pictures (default: the current folder)"
    )
    caption.add_argument(
        "--json", action="store_true", help="one JSON object per line, with words and log-probabilities"
    )
    caption.add_argument(
        "-r", "--recursive", action="store_true", help="also the photos in subfolders, except in hidden ones"
    )
    caption.add_argument("--csv", type=_path, metavar="FILE", help="write a table, which grows meanwhile")
    caption.add_argument("--html", type=_path, metavar="FILE", help="write a page with the photos in it")
    caption.add_argument(
        "--sidecar", action="store_true", help="write the caption of dog.jpg into dog.txt beside the photo"
    )
    caption.add_argument(
        "--write-exif",
        action="store_true",
        help="write the caption into the photo itself, as alternative text (XMP) and description (EXIF); needs pyexiv2",
    )
    caption.add_argument(
        "--overwrite", action="store_true", help="replace files, text files and descriptions that are already there"
    )
    caption.add_argument(
        "--resume",
        action="store_true",
        help="leave out photos that --csv FILE contains; without --csv, those with a text file beside them",
    )
    caption.add_argument(
        "--results",
        type=_path,
        metavar="FILE",
        help="also write COCO results; image ids are the numbers at the end of the file names",
    )
    _add_max_megapixels(caption)
    _add_decoding(caption)
    _add_code(caption)
    _add_weights(caption)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        type=_run,
        action="append",
        default=[],
        help="the run's folder, or hf://USER/NAME (default: the model that comes with imgcap_jax); several make an "
        "ensemble",
    )


def _add_calibrate(commands: Commands) -> None:
    calibrate = _add_command(
        commands,
        "calibrate",
        add_help=False,
        help="fit the confidence of captions",
        description="Caption validation splits with a run, fit the probability that a caption is right to their "
        "CIDEr-D, and write it into the run's folder. imgcap caption then shows the confidence of each caption.",
    )
    calibrate.add_argument("run", type=_run, metavar="RUN", help="the run's folder")
    calibrate.add_argument("--split", default="val", help="a split that the run was not trained on (default: val)")
    calibrate.add_argument(
        "--dataset",
        action="append",
        default=[],
        help="a dataset other than the run's; can be repeated: all count alike, whatever their number of images",
    )
    _add_decoding(calibrate)
    _add_code(calibrate)
    _add_cache(calibrate)
    _add_weights(calibrate)
    _add_data_dir(calibrate, "that of the run if it exists, or else ")


def _add_serve(commands: Commands) -> None:
    serve = _add_command(
        commands,
        "serve",
        add_help=False,
        help="serve a local web page that captions photos, and a JSON endpoint",
        description="Serve a web page on this machine: drop or paste photos, or use the camera. The JSON endpoint is "
        "POST /api/caption, described by /openapi.json; /healthz and /metrics (Prometheus) are for operation. Nothing "
        "is written to disk. Needs fastapi, uvicorn and prometheus-client.",
    )
    _add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="the address (default: 127.0.0.1, this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    serve.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which others reach the service, for example through a proxy; can be repeated (default: "
        "none, or any if --host is not this machine)",
    )
    serve.add_argument("--max-megabytes", type=float, default=20.0, metavar="N", help="largest file (default: 20)")
    serve.add_argument("--waiting", type=int, default=128, metavar="N", help="photos that can wait (default: 128)")
    serve.add_argument("--seconds", type=float, default=60.0, metavar="N", help="time per photo (default: 60)")
    _add_max_megapixels(serve, 50)
    _add_decoding(serve)
    _add_code(serve)
    _add_weights(serve)


def _add_push(commands: Commands) -> None:
    push = _add_command(
        commands,
        "push",
        help="put a run on the Hugging Face Hub",
        description="Export a run and put it on the Hugging Face Hub, with its model card. Everybody can then use it "
        "as hf://USER/NAME. Needs huggingface_hub, and a token (HF_TOKEN, or hf auth login).",
    )
    push.add_argument("run", type=_run, metavar="RUN", help="the run's folder, or an exported one, whose card is kept")
    push.add_argument("name", metavar="USER/NAME", help="where to")
    push.add_argument("--private", action="store_true", help="a new folder is private")
    push.add_argument("--message", default="Upload a model of imgcap_jax", help="the message of the commit")
    _add_dtype(push)
    _add_code(push)
    _add_weights(push)


def _add_pull(commands: Commands) -> None:
    pull = _add_command(
        commands,
        "pull",
        help="copy a run from the Hugging Face Hub",
        description="Copy an exported run from the Hugging Face Hub. Nothing in it is executed. Every command also "
        "reads hf://USER/NAME directly.",
    )
    pull.add_argument("name", metavar="USER/NAME[@REVISION]", help="the run")
    pull.add_argument("folder", nargs="?", type=_path, help="the new folder (default: runs/NAME)")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="the type of the parameters in the file (default: float16, or that of a run that was exported)",
    )


def _add_export(commands: Commands) -> None:
    export = _add_command(
        commands,
        "export",
        add_help=False,
        help="write a run as a folder to share, or as one file with a compiled program",
        description="Write the best parameters of a run, and what is needed to use them, into a new folder: the "
        "experiment, the vocabulary, model.safetensors, the scores of evaluations, and a model card. The folder can "
        "be used as a run, but its training cannot be resumed. If the name ends in .imgcap, write one file that also "
        "contains the compiled program (StableHLO, with the search) and a loader, which needs jax, flatbuffers, numpy "
        "and pillow only. If it ends in .onnx, write an ONNX file.",
    )
    export.add_argument("run", type=_run, metavar="RUN", help="the run's folder, or a file FILE.imgcap to write again")
    export.add_argument("output", type=_path, metavar="FOLDER|FILE.imgcap|FILE.onnx", help="the new folder or file")
    _add_decoding(export)
    _add_dtype(export)
    _add_code(export)
    _add_weights(export)


def _add_score(commands: Commands) -> None:
    score = _add_command(
        commands,
        "score",
        help="score any system's captions against references",
        description="Score captions in COCO's results format against references in COCO's annotations format: BLEU, "
        "METEOR, ROUGE-L and CIDEr-D equal to the official tools, without Java, and CIDEr. Scores are x100 on the "
        "terminal and 0 to 1 (CIDEr 0 to 10) in JSON.",
    )
    score.add_argument(
        "captions",
        type=_path,
        help='results: [{"image_id": 1, "caption": "..."}, ...]; with --judgements, a CSV file of ratings',
    )
    score.add_argument(
        "references", type=_path, help='annotations: {"annotations": [{"image_id": 1, "caption": "..."}, ...]}'
    )
    score.add_argument(
        "--compare", type=_path, metavar="OTHER", help="results of another system: differences by paired bootstrap"
    )
    score.add_argument(
        "--images",
        metavar="FIRST:END",
        help="score only these images, by their place in REFERENCES: 500: for all after the first 500 (default: all)",
    )
    score.add_argument(
        "--mbr",
        type=_path,
        nargs="+",
        metavar="OTHER",
        help="choose, for each image, among CAPTIONS and those of other systems: the caption that agrees most with the "
        "others in CIDEr-D (minimum Bayes risk); document frequencies are those of --training or --idf, or else of "
        "the captions themselves",
    )
    score.add_argument(
        "--mbr-bleu", type=float, metavar="W", help="add W times smoothed BLEU-4 to the agreement of --mbr (default: 0)"
    )
    score.add_argument("--mbr-output", type=_path, metavar="FILE", help="also write the captions that --mbr chose")
    score.add_argument(
        "--bootstrap", type=int, metavar="N", help="samples for --compare or --judgements (default: 1000)"
    )
    score.add_argument("--json", type=_path, metavar="FILE", help="also write all scores, including those per image")
    score.add_argument(
        "--idf", type=_path, metavar="REFERENCES", help="take CIDEr's document frequencies from these captions"
    )
    score.add_argument(
        "--training", type=_path, metavar="REFERENCES", help="training captions: also report the share of new captions"
    )
    score.add_argument(
        "--samples", type=_path, metavar="CAPTIONS", help="several captions per image: also report their diversity"
    )
    score.add_argument("--spice", action="store_true", help="also SPICE, by the official Java tool (minutes)")
    score.add_argument(
        "--objects",
        action="store_true",
        help="also COCO's 80 objects in the captions: CHAIRs and CHAIRi (hallucination), recall, precision, per object",
    )
    score.add_argument(
        "--instances",
        type=_path,
        metavar="FILE",
        help="for --objects, COCO's instance annotations (instances_val2014.json): these objects are present too",
    )
    score.add_argument(
        "--judgements",
        action="store_true",
        help="correlate the metrics with human ratings (Kendall's tau-b and tau-c): CAPTIONS is a CSV file with the "
        "columns image (an id or a file name), caption and rating, one rating per line",
    )
    _add_tokenizer(score)


def _add_report(commands: Commands) -> None:
    report = _add_command(
        commands,
        "report",
        help="one HTML page about runs: curves, scores, captions with attention, mistakes, settings",
        description="Write a page about one or several runs, which opens without a network. The captions of the first "
        "run are shown in detail. Stored captions are reused; if they are missing or out of date, the split is decoded "
        "with the run's own settings, as by imgcap evaluate.",
    )
    report.add_argument(
        "runs", nargs="+", type=_run, metavar="RUN", help="runs, or folders of runs such as populations and studies"
    )
    report.add_argument("--split", default="val", help="the split whose captions are shown (default: val)")
    report.add_argument(
        "--output", type=_path, default=Path("report.html"), metavar="HTML", help="the page (default: report.html)"
    )
    report.add_argument("--images", type=int, default=36, metavar="N", help="images on the page (default: 36)")
    _add_code(report)
    _add_cache(report)
    _add_weights(report)
    _add_data_dir(report, "that of the run if it exists, or else ")


def _add_prepare(actions: Commands) -> None:
    prepare = _add_command(
        actions,
        "prepare",
        help="write a dataset in TFDS's format",
        description="Write a dataset in TFDS's format. Nothing is done if it is up to date: prepared from the same "
        "data, with files of the right sizes. imgcap data inspect NAME --check reads all files.",
    )
    prepare.add_argument(
        "source",
        help="scenes, coco, flickr8k, flickr30k, a folder of images with captions (docs/datasets.md lists the formats) "
        "or a Python file with a dataset builder",
    )
    prepare.add_argument("--name", help="the dataset's name (default: the name of the folder or file, or scenes)")
    prepare.add_argument("--licence", default="", help="a note on the licence of the images, stored with the dataset")
    prepare.add_argument(
        "--source-note", default="", help="a note on the origin of the images, stored with the dataset"
    )
    known = prepare.add_argument_group(
        "files of coco, flickr8k and flickr30k",
        "COCO's are downloaded if they are not given. Without options, flickr8k and flickr30k say where to get theirs.",
    )
    known.add_argument(
        "--images",
        type=_path,
        action="append",
        default=[],
        metavar="PATH",
        help="a folder or zip archive of photos; for coco, it can be repeated",
    )
    known.add_argument(
        "--annotations", type=_path, metavar="PATH", help="coco: annotations_trainval2014.zip or its extracted folder"
    )
    known.add_argument(
        "--split-file",
        type=_path,
        metavar="PATH",
        help="Karpathy's dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json, or caption_datasets.zip; "
        "for coco also the folder of BLIP's coco_karpathy_*.json; for the others any captions with these splits",
    )
    known.add_argument(
        "--download-dir",
        type=_path,
        metavar="FOLDER",
        help="coco: folder of the downloaded archives (default: downloads/coco in the folder of datasets)",
    )
    prepare.add_argument("--train-scenes", type=int, metavar="N", help="scenes: number of training scenes (8000)")
    _add_max_megapixels(prepare)
    _add_data_dir(prepare)


def _add_inspect(actions: Commands) -> None:
    inspect = _add_command(
        actions,
        "inspect",
        help="counts, lengths, words and a contact sheet",
        description="Print counts, lengths and vocabulary coverage of a dataset, and draw a contact sheet.",
    )
    inspect.add_argument("name", help="a prepared dataset")
    inspect.add_argument("--min-count", type=int, default=5, help="smallest count of a vocabulary word (default: 5)")
    inspect.add_argument("--sheet", type=_path, help="file of the contact sheet (default: <name>.png)")
    inspect.add_argument("--check", action="store_true", help="only check that no file of the dataset is damaged")
    _add_tokenizer(inspect)
    _add_data_dir(inspect)


def _add_list(actions: Commands) -> None:
    listing = _add_command(
        actions,
        "list",
        help="the prepared datasets",
        description="List the prepared datasets with their splits, sizes and origins. Only sizes and small files are "
        "checked; imgcap data inspect NAME --check reads all files.",
    )
    _add_data_dir(listing)


def _add_doctor(commands: Commands) -> None:
    doctor = _add_command(
        commands,
        "doctor",
        help="what works here, what is missing, and what to type next",
        description="Report devices, versions, folders, datasets, runs and extras, what is missing, and what to type "
        "next. The exit code is 1 if training, evaluating or captioning cannot work here. Nothing is downloaded.",
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_data_dir(doctor)


def _add_distributed(parser: argparse.ArgumentParser, verb: str, more: str = "") -> None:
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,COUNT,INDEX",
        help=f"{verb} on several hosts, with the same command on each and the run on a shared disk or in a bucket; "
        f"give no value on Cloud TPU and Slurm.{more}",
    )


def _add_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--code",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file (or module) that defines classes a run needs; it is executed. Can be repeated",
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        default="ptb",
        help="how captions become words: ptb (default), characters (Chinese, Japanese, Thai), or MODULE:CLASS "
        "of your own with --code",
    )
    _add_code(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=_folder,
        help="folder of encoder features (default: .cache next to the run)",
    )


def _add_max_megapixels(parser: argparse.ArgumentParser, default: int = 100) -> None:
    parser.add_argument(
        "--max-megapixels",
        type=float,
        metavar="N",
        help=f"refuse larger images (default: {default}; half of it for WebP and AVIF, ten times for JPEG)",
    )


def _add_data_dir(parser: argparse.ArgumentParser, first: str = "") -> None:
    parser.add_argument(
        "--data-dir",
        type=_folder,
        help=f"folder of datasets (default: {first}$TFDS_DATA_DIR, or else ~/tensorflow_datasets)",
    )


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        type=_path,
        action="append",
        default=[],
        metavar="FILE",
        help="the pretrained weights of a run's encoder, if they are not where the run read them; can be repeated",
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action=_DecodingHelp)
    short = parser.add_argument_group("short forms of decoding options (default: those of the run)")
    short.add_argument("--beam", type=int, metavar="N", help="number of beams; 1 is greedy search")
    short.add_argument("--length-norm", type=float, metavar="X", help="exponent of the length penalty")
    short.add_argument("--n-best", type=int, metavar="N", help="captions per image, with scores; raises the run's beam")
    short.add_argument("--max-words", type=int, metavar="N", help="the longest caption")
