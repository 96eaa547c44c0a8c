"""Options made from settings: overrides, decoding options and sweeps."""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from imgcap_jax.cli.options import as_typed, option_names, options_help, override
from imgcap_jax.cli.sweeps import combinations, split_options
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment
from imgcap_jax.models.decoders.adaptive import Adaptive
from imgcap_jax.models.decoders.aoa import AttentionOnAttention
from imgcap_jax.models.decoders.att2in import Att2in
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.decoders.transformer import Transformer
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.models.encoders.vgg import VGG
from imgcap_jax.tokenizers import Characters, PennTreebank, Tokenizer
from imgcap_jax.training.self_critical import SelfCritical


class Contract(Protocol):
    """A part that the settings below are typed by."""

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Part:
    """A part that only this file knows."""

    size: int = 3
    """The size of the part."""
    loud: bool = False


@dataclass(frozen=True)
class Whole:
    """Settings with parts that are typed by a contract."""

    part: Contract = field(default_factory=Part)
    maybe: Contract | None = None
    several: tuple[Contract, ...] = ()
    words: tuple[str, ...] = ()
    folder: Path | None = None


def test_fields_typed_by_a_contract_have_the_options_of_their_value() -> None:
    whole = Whole(maybe=Part(4), several=(Part(5), Part(6)))
    options = ["--part.size", "7", "--maybe.loud", "true", "--several.1.size=8", "--words", "a,b c", "--folder", "x"]
    assert override(whole, options) == Whole(Part(7), Part(4, True), (Part(5), Part(8)), ("a", "b c"), Path("x"))
    assert override(whole, []) == whole
    assert "fixed" not in options_help(Experiment(), command="imgcap")
    listed = options_help(whole, command="imgcap")
    for name in option_names(whole):
        assert name in listed
    assert "The size of the part." in listed
    assert "{true,false}" in listed
    assert override(Experiment(encoder=ResNet()), ["--encoder.depth", "101"]).encoder == ResNet(depth=101)


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_truth_is_written_alike_everywhere(text: str) -> None:
    assert override(Part(), ["--loud", text]).loud is True
    assert override(
        Experiment(), ["--decoding.suppress-unk", "False", "--decoding.forbid-bad-endings", text]
    ).decoding == (Decoding(suppress_unk=False, forbid_bad_endings=True))
    (settings,), _ = combinations(Decoding(), [f"--decode.forbid-bad-endings={text}"])
    assert settings.forbid_bad_endings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part.seize", "3"], "unknown option --part.seize; did you mean --part.size?"),
        (["--part.size", "x"], "--part.size"),
        (["--part.loud", "maybe"], "--part.loud"),
    ],
)
def test_a_wrong_option_is_reported_in_one_line(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        override(Whole(), options)
    assert message in str(error.value)


def test_options_make_every_combination() -> None:
    others, ours = split_options(
        ["evaluate", "--decode.beam", "1", "3", "run", "--floor", "--decode.must", "dog|dogs,red", "-h"], sweep=True
    )
    assert others == ["evaluate", "run", "--floor", "-h"]
    settings, swept = combinations(Decoding(), ours)
    assert [(one.beam, one.must) for one in settings] == [(beam, ("dog|dogs", "red")) for beam in (1, 3)]
    assert swept == ["beam"]
    ours = split_options(["--decode.length-norm", "0", "0.7", "--decode.suppress-unk=false"], sweep=True)[1]
    settings, swept = combinations(Decoding(prefix="a"), [*ours, "--decode.prefix="])
    assert {one.prefix for one in settings} == {""}
    assert [(one.length_norm, one.suppress_unk) for one in settings] == [(0.0, False), (0.7, False)]
    # Values that are only valid together.
    settings, swept = combinations(Decoding(), ["--decode.samples=2", "--decode.samples=3", "--decode.top-p=0.9"])
    assert [(one.samples, one.top_p) for one in settings] == [(2, 0.9), (3, 0.9)]
    _, ours = split_options(["--decode.length-norm", "-.5", "0", "--decode.prefix", "a man", "run"], sweep=True)
    assert ours == ["--decode.length-norm=-.5", "--decode.length-norm=0", "--decode.prefix=a man"]
    # A photo after an option is not its value.
    assert split_options(["caption", "--decode.beam", "3", "a.jpg"], sweep=False)[0] == ["caption", "a.jpg"]


@dataclass(frozen=True)
class Cased(PennTreebank):
    """A tokeniser with a field."""

    lower: bool = True
    label: str = "cased"  # type: ignore[assignment]


def test_a_tokenizer_is_given_by_name_and_its_fields_are_options() -> None:
    def given(*options: str, start: Tokenizer = PennTreebank()) -> Tokenizer:  # noqa: B008
        return override(Experiment(data=CaptionData(tokenizer=start)), options).data.tokenizer

    assert given() == PennTreebank()
    assert given("--data.tokenizer", "characters") == Characters()
    assert given("--data.tokenizer", "ptb", start=Characters()) == PennTreebank()
    assert given("--data.tokenizer", "imgcap_jax.tokenizers:Characters") == Characters()
    assert given("--data.tokenizer.lower", "false", start=Cased()) == Cased(lower=False)
    assert given("--data.augmentation.side-words", "links,rechts") == PennTreebank()
    with pytest.raises(UserError, match="there is no tokenizer 'words'; use ptb or characters"):
        given("--data.tokenizer", "words")
    assert "--data.tokenizer {ptb,characters,MODULE:CLASS}" in options_help(Experiment(), command="imgcap train x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode.beam", "x"], "--decode.beam"),
        (["--decode.beams", "3"], "did you mean --decode.beam"),
        (["--decode.beam"], "has no value"),
        (["--decode.beam", "3", "3"], "given twice"),
        (["--decode.suppress-unk", "maybe"], "neither true nor false"),
        (["--decode.temperature", "0.5"], "temperature only affects samples"),
        (["--decode.groups", "2"], "must be a multiple of groups"),
        (["--decode.samples", "2", "--decode.must", "dog"], "three kinds"),
        (["--decode.length-penalty", "wu"], "--decode.length-penalty"),
        (["--decode.length-norm", "nan"], "--decode.length-norm is nan; it must be at least 0 and finite"),
        (["--decode.diversity", "0.2"], "set groups as well"),
        (["--decode.samples", "3", "--decode.n-best", "2"], "all samples are returned"),
        (["--decode.n-best", "4", "--decode.beam", "3"], "--decode.n-best is 4, but beam is 3"),
        (["--decode.min-words", "30"], "max_words (20)"),
        (["--decode.top-p", "0", "--decode.samples", "1"], "--decode.top-p is 0"),
    ],
)
def test_wrong_decoding_options_are_reported_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        combinations(Decoding(), split_options(arguments, sweep=True)[1])
    assert message in str(error.value)


PARTS = (
    *(ShowAttendTell(), ShowTell(), Att2in(), Adaptive(), UpDown(), AttentionOnAttention(), Transformer()),
    *(EfficientNetLite(), ResNet(), VGG(), RegionFiles(folder=Path("regions"), region_size=4), SelfCritical()),
)


@pytest.mark.parametrize("part", [None, *PARTS], ids=lambda part: type(part).__name__)
def test_a_number_out_of_range_is_reported_with_the_option_as_it_was_typed(part: Any) -> None:
    """Every number of every settings class has a range: none accepts -1, or nan."""
    kinds = {"encoder": (EfficientNetLite, ResNet, VGG, RegionFiles), "objective": (SelfCritical,)}
    name = next((name for name, types in kinds.items() if isinstance(part, types)), "decoder")
    experiment = Experiment() if part is None else replace(Experiment(), **{name: part})
    options = [option for option in option_names(experiment) if part is None or option.startswith(f"--{name}.")]
    tried = 0
    for option in options:
        value: Any = experiment
        for field_name in option.removeprefix("--").replace("-", "_").split("."):
            value = getattr(value, field_name)
        if type(value) not in (int, float):
            continue
        for bad in ("-1", "nan") if isinstance(value, float) else ("-1",):
            with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(option)}\b[^\n]+$"):
                override(experiment, [option, bad])
            tried += 1
    assert tried > 1


def test_a_field_is_named_only_if_its_option_was_typed() -> None:
    said = as_typed("top_p is 2; it must be below 1", ["--decode.must", "dog", "--decode.top_p=2"])
    assert said == "--decode.top_p is 2; it must be below 1"  # "must" is a word here
    assert as_typed("training.epochs_x is 0", ["--training.epochs", "0"]) == "training.epochs_x is 0"
    assert as_typed("decoder.heads is 3", ["--decoder.layers", "1"]) == "decoder.heads is 3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data.max-words 5 --decoding.max-words 0", "--decoding.max-words is 0"),
        ("--objective.temperature 0.5 --decoding.temperature 0.5", "--decoding.temperature only affects samples"),
        ("--training.seed 3 --decoding.seed 1", "--decoding.seed only affects samples"),
        ("--objective.samples 5 --decoding.samples -1", "--decoding.samples is -1"),
        ("--decoding.samples -1 --objective.samples 5", "--decoding.samples is -1"),
        ("--decoding.samples 5 --objective.samples -1", "--objective.samples is -1"),
    ],
)
def test_of_two_options_with_the_same_last_part_the_wrong_one_is_named(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{message}"):
        override(Experiment(objective=SelfCritical()), arguments.split())


def test_an_integer_above_the_largest_float_is_out_of_range() -> None:
    with pytest.raises(UserError, match=r"^--training.seed is 10{400}; it must be at least 0 and at most 4294967295$"):
        override(Experiment(), ["--training.seed", "1" + "0" * 400])


def test_help_lists_every_decoding_option_and_its_meaning() -> None:
    text: Any = options_help(Decoding(), prefix="decode", command="imgcap evaluate")
    for item in fields(Decoding):
        if item.name != "rules":
            assert f"--decode.{item.name.replace('_', '-')} " in text
    assert "constrained beam search" in " ".join(text.split())
