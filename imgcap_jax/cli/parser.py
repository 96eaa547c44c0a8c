"""What the ``imgcap`` command understands."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from imgcap_jax.decoding.settings import options_help

_EPILOG = """examples:
  imgcap data prepare scenes
  imgcap train scenes_demo
  imgcap train flickr8k --run runs/mine --decoder.hidden-size 768
  imgcap train flickr8k_scst --init-from runs/flickr8k
  imgcap features flickr8k
  imgcap evaluate runs/flickr8k --split val --beam 3
  imgcap evaluate runs/flickr8k --decode.beam 1 3 5 --decode.length-norm 0 0.7
  imgcap caption photo.jpg holiday/ --run runs/flickr8k
  imgcap caption photo.jpg --run runs/flickr8k --attention
  imgcap caption photo.jpg --run runs/flickr8k --n-best 3 --decode.must frisbee
  imgcap score captions.json references.json --compare other.json"""


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as all others are told."""

    def error(self, message: str) -> NoReturn:
        print(f"imgcap: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser; its commands are named in the option `command`."""
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
    train.set_defaults(command="train", parser=train)
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
    features.set_defaults(command="features", parser=features)
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
    evaluate.set_defaults(command="evaluate", parser=evaluate)
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
    caption.set_defaults(command="caption", parser=caption)
    caption.add_argument("photos", nargs="+", type=Path, help="image files, or folders of them")
    caption.add_argument(
        "--run", type=Path, required=True, action="append", help="the run's folder; given again, an ensemble"
    )
    caption.add_argument("--attention", action="store_true", help="draw where the best caption's words looked")
    caption.add_argument(
        "--attention-dir", type=Path, metavar="FOLDER", help="where those pictures go (default: the present folder)"
    )
    caption.add_argument("--json", action="store_true", help="one JSON object a line, with words and log-probabilities")
    caption.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="also write COCO's results; image ids are the numbers that file names end in",
    )
    _add_decoding(caption)
    _add_cache(caption)

    score = commands.add_parser(
        "score",
        allow_abbrev=False,
        help="score a file of captions, of any system, against a file of references",
        description="Score captions in COCO's results format against references in COCO's annotations format: BLEU, "
        "METEOR, ROUGE-L and CIDEr-D equal to the official tools, without Java, and CIDEr. Scores are x100 on the "
        "terminal and 0 to 1 (CIDEr 0 to 10) in JSON.",
    )
    score.set_defaults(command="score", parser=score)
    score.add_argument("captions", type=Path, help='results: [{"image_id": 1, "caption": "..."}, ...]')
    score.add_argument(
        "references", type=Path, help='annotations: {"annotations": [{"image_id": 1, "caption": "..."}, ...]}'
    )
    score.add_argument(
        "--compare", type=Path, metavar="OTHER", help="another system's results: differences by paired bootstrap"
    )
    score.add_argument("--bootstrap", type=int, metavar="N", help="samples drawn for --compare (default: 1000)")
    score.add_argument("--json", type=Path, metavar="FILE", help="also write all scores, of each image too")
    score.add_argument(
        "--idf", type=Path, metavar="REFERENCES", help="CIDEr's document frequencies from these captions instead"
    )
    score.add_argument(
        "--training", type=Path, metavar="REFERENCES", help="training captions: how many of the captions are new?"
    )
    score.add_argument(
        "--samples", type=Path, metavar="CAPTIONS", help="several captions an image: how different are they?"
    )
    score.add_argument("--spice", action="store_true", help="SPICE too, by the official Java tool (minutes)")

    submission = commands.add_parser(
        "submission",
        allow_abbrev=False,
        help="pack captions for COCO's test server",
        description="Pack results of val2014 and test2014 into the zip that COCO's test server takes.",
    )
    submission.set_defaults(command="submission", parser=submission)
    submission.add_argument("--name", required=True, help="what the server is to call the system")
    submission.add_argument("--val", type=Path, metavar="CAPTIONS", help="results of the 40,504 images of val2014")
    submission.add_argument("--test", type=Path, metavar="CAPTIONS", help="results of the 40,775 images of test2014")
    submission.add_argument("--output", type=Path, default=Path("results.zip"), help="(default: results.zip)")

    data = commands.add_parser("data", allow_abbrev=False, help="prepare and look at datasets")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", allow_abbrev=False, help="write a dataset in TFDS's format")
    prepare.set_defaults(command="prepare", parser=prepare)
    prepare.add_argument("source", help="scenes, coco, or a folder of images with a caption file")
    prepare.add_argument("--name", help="what to call the dataset (default: the folder's name, or scenes)")
    prepare.add_argument("--licence", default="", help="a note on the images' licence, kept with the dataset")
    prepare.add_argument("--source-note", default="", help="where a folder's images come from, kept with the dataset")
    prepare.add_argument("--download-dir", type=Path, help="coco: where its archives are kept")
    prepare.add_argument("--train-scenes", type=int, metavar="N", help="scenes: how many to draw for training")
    _add_data_dir(prepare)
    inspect = actions.add_parser("inspect", allow_abbrev=False, help="counts, lengths, words and a contact sheet")
    inspect.set_defaults(command="inspect", parser=inspect)
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
