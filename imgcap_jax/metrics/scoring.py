"""Scores candidate captions against reference captions, and defines the contract of a metric.

A metric works in two stages. References are processed once. Candidates are processed each time they are scored.
Letters: I images, C references of all images, B samples of images.

Stage 1, references: a ``Metric`` is called with one argument, a ``References`` object (``metrics/corpus.py``). It
does all work that depends on the references only, and returns a function. Every image has at least one reference.
``References`` contains:

- ``image_ids``: the image ids, in the order of all arrays [I].
- ``tokens``: for each image, a tuple with the list of tokens of each reference. Captions are tokenised as the official
  COCO tools do, or by another tokeniser of the run (``imgcap_jax/tokenizers.py``). A list of tokens can be empty.
- ``per_image`` [I]: the number of references of each image. ``image_of`` [C]: the position of the image of each
  reference. ``lengths`` [C]: the number of tokens in each reference.
- ``n_grams``: the ids and counts of the n-grams of all references.

Stage 2, candidates: the returned function is called with one argument, a ``Candidates`` object. It contains one
candidate per image, in the order of ``References.image_ids``:

- ``tokens``: the list of tokens of each candidate. It can be empty.
- ``lengths`` [I]: the number of tokens in each candidate.
- ``counts``: the n-gram counts, with the ids of ``References.n_grams``.

The function returns a dictionary from names to ``MetricScore``. The names are reported, so they must be unique among
all metrics. One metric can return several names (BLEU returns BLEU-1 to BLEU-4). A ``MetricScore`` has two fields:

- ``images``: the score of each image, a float array [I].
- ``corpus``: a function that computes the score of a set of images. It is called with ``counts``, float [B,I], and
  returns the scores, [B]. ``counts[b, i]`` is the number of times that image i occurs in sample b. The score of the
  split is ``corpus(np.ones((1, I)))[0]``. The paired bootstrap (``metrics/compare.py``) passes other counts.

``mean_score(images)`` returns a ``MetricScore`` whose score of a set is the mean over its images. Scores must be
finite. The built-in scores range from 0 to 1 (CIDEr: 0 to 10). Reports print all scores times 100.

The function can have an attribute ``warnings``: lines (or one line) that say why the references alone make its scores
misleading. ``CaptionScorer.warnings`` contains them.

Labels and signatures: ``CaptionScorer`` takes metrics as a dictionary from labels to metrics. A label states the
name of the metric and every parameter that changes its scores: ``"CIDEr-D:s6:idf=references"``. It must not contain "|"
or ",". ``Scores.signature`` contains the labels of all metrics, in the order of the dictionary:
``imgcap-<version>|tok:<tokeniser>|refs:<per image>|n:<images>|<label>,<label>,...``. ``Scores.signatures`` maps each
reported name to a signature that contains only the label of the metric that returned the name.

Custom metrics: a ``CustomMetric`` is a frozen dataclass that implements the two stages and has a label. It is passed as
``Experiment(metrics=(LengthMatch(),))``. It is computed in addition to ``available_metrics``, with its label as the key
in the dictionary. A metric with the label of a built-in metric replaces the built-in metric. Example::

    @dataclass(frozen=True)
    class LengthMatch:
        scale: float = 5.0

        @property
        def label(self) -> str:
            return f"LengthMatch:scale={self.scale:g}"

        def __call__(self, references: References) -> Callable[[Candidates], MetricScores]:
            mean = np.array([np.mean([len(words) for words in texts]) for texts in references.tokens])  # [I]

            def score(candidates: Candidates) -> MetricScores:
                distance = np.abs(candidates.lengths - mean)
                return {"LengthMatch": mean_score(np.exp(-distance / self.scale))}

            return score

A metric that is part of this package is added to ``available_metrics``.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Protocol

from imgcap_jax import __version__
from imgcap_jax.errors import UserError
from imgcap_jax.metrics import bleu, cider, rouge
from imgcap_jax.metrics.corpus import Candidates, MetricScore, MetricScores, References
from imgcap_jax.metrics.meteor import metric as meteor
from imgcap_jax.metrics.meteor.tables import HOW_TO_ADD, package_folder
from imgcap_jax.tokenizers import DEFAULT, Tokenizer, looks_english, splits_english_words, tokens_of, why_unsegmented

Metric = Callable[[References], Callable[[Candidates], MetricScores]]
"""Takes references and returns a function that scores candidates. The module docstring describes the contract."""


class CustomMetric(Protocol):
    """A metric as a part of an experiment: a frozen dataclass that is a ``Metric`` and has a label."""

    @property
    def label(self) -> str:
        """Name and parameters, as they appear in signatures: ``"MyMetric:alpha=0.5"``."""
        ...

    def __call__(self, references: References) -> Callable[[Candidates], MetricScores]:
        """See ``Metric``. The keys of the returned scores are the names under which they are reported."""
        ...


_METEOR = "METEOR:1.5-en-norm"
_OWN_IDF = "idf=references"


def available_metrics(
    idf: Mapping[int, Sequence[str]] | None = None,
    *,
    idf_name: str = "corpus",
    original_cider: bool = False,
    tokenizer: Tokenizer = DEFAULT,
) -> dict[str, Metric]:
    """The metrics that can be computed on this machine.

    Args:
        idf: image id -> captions of the corpus that document frequencies are computed from. None uses the references.
        idf_name: the name of that corpus in signatures. The number of its images and a digest of its words are added.
        original_cider: adds the original CIDEr to CIDEr-D.
        tokenizer: that of the captions. METEOR, which is for English, is left out if it is not the default.

    Returns:
        Label -> metric.

    Raises:
        UserError: the corpus has fewer than two images, so that every idf would be 0.
    """
    corpus, source = None, _OWN_IDF
    if idf is not None:
        if len(idf) < 2:
            raise UserError(f"document frequencies need a corpus of at least two images; {idf_name} has {len(idf)}")
        corpus = References.from_captions(idf, tokenizer).tokens
        digest = hashlib.sha256("\n".join(" ".join(text) for texts in corpus for text in texts).encode()).hexdigest()
        source = f"idf={re.sub('[^A-Za-z0-9._-]', '_', idf_name)}-{len(corpus)}-{digest[:8]}"
    vectors = cache(partial(cider.Vectors, corpus=corpus))  # shared by CIDEr-D and the original CIDEr
    found: dict[str, Metric] = {"BLEU:closest": bleu.prepare}
    if not missing_metrics(tokenizer):
        found[_METEOR] = meteor.prepare
    found[f"ROUGE-L:b{rouge.BETA:g}"] = rouge.prepare
    found[f"CIDEr-D:s{cider.SIGMA:g}:{source}"] = lambda references: cider.ClippedScorer(vectors(references))
    if original_cider:
        found[f"CIDEr:unclipped:{source}"] = lambda references: cider.score_original(vectors(references))
    return found


def missing_metrics(tokenizer: Tokenizer = DEFAULT) -> dict[str, str]:
    """The metrics that cannot be computed, each with the command that installs it, or the reason."""
    if not splits_english_words(tokenizer):
        return {"METEOR": why_english_only("METEOR", tokenizer)}
    return {} if package_folder() else {"METEOR": HOW_TO_ADD}


def why_english_only(metric: str, tokenizer: Tokenizer) -> str:
    """The reason why an English metric is left out."""
    return f"{metric} is defined for the words of English captions; with the tokenizer {tokenizer.label} it is left out"


@dataclass(frozen=True)
class Scores:
    """Scores of a set of candidates.

    Attributes:
        values: metric -> score of the whole set, 0 to 1 (CIDEr: 0 to 10). Papers print scores times 100.
        per_image: metric -> image id -> score.
        signature: states how the scores were computed, as in sacreBLEU. Scores with different signatures cannot be
            compared.
        warnings: one line for each reason why the scores can be misleading.
        missing: the metrics that could not be computed, each with the command that installs it, or the reason.
        signatures: metric -> the signature of that metric alone.
        metrics: metric -> the scores of all images and of samples of them, for the comparison of systems.
    """

    values: dict[str, float]
    per_image: dict[str, dict[int, float]]
    signature: str
    warnings: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, MetricScore] = field(default_factory=dict, repr=False, compare=False)


def with_custom(metrics: Mapping[str, Metric], custom: Sequence[CustomMetric]) -> dict[str, Metric]:
    """Adds custom metrics to others.

    Raises:
        UserError: a label is taken, or contains a character that separates the parts of signatures.
    """
    together = dict(metrics)
    for metric in custom:
        if metric.label in together or set(metric.label) & set("|,"):
            raise UserError(f"metrics: the label {metric.label!r} must be unique and must not contain | or a comma")
        together[metric.label] = metric
    return together


class CaptionScorer:
    """Scores candidates against references that are tokenised and counted once.

    Args:
        references: image id -> raw captions. The idf of CIDEr-D depends on this set of images.
        metrics: label -> metric. None means ``available_metrics(tokenizer=tokenizer)``.
        tokenizer: splits references and candidates.

    Attributes:
        references: the tokenised references.
        signature: the signature with the labels of all metrics.
        warnings: one line for each reason why the references alone make scores misleading, whatever the candidates.

    Raises:
        UserError: there is no image, or an image has no reference.
    """

    def __init__(
        self,
        references: Mapping[int, Sequence[str]],
        metrics: Mapping[str, Metric] | None = None,
        *,
        tokenizer: Tokenizer = DEFAULT,
    ) -> None:
        if not references:
            raise UserError("there are no references to score against: choose a split or file that has captions")
        bare = [image_id for image_id, captions in references.items() if not captions]
        if bare:
            raise UserError(f"image {bare[0]} has no reference{_and_more(bare)}: add captions, or remove this image")
        metrics = available_metrics(tokenizer=tokenizer) if metrics is None else metrics
        self._tokenizer = tokenizer
        self._missing = missing_metrics(tokenizer)
        self.references = References.from_captions(references, tokenizer)
        self._metrics = {label: prepare(self.references) for label, prepare in metrics.items()}
        self.signature = self._sign(list(metrics))
        own = (line for score in self._metrics.values() for line in _lines(getattr(score, "warnings", ())))
        self.warnings: tuple[str, ...] = (*_reference_warnings(self.references, metrics, tokenizer), *own)

    def score(self, candidates: Mapping[int, str]) -> Scores:
        """Scores one candidate per image.

        Args:
            candidates: image id -> raw caption, in any order.

        Raises:
            UserError: an image has no candidate, or a candidate's image has no references.
        """
        image_ids = self.references.image_ids
        absent = [image_id for image_id in image_ids if image_id not in candidates]
        if absent:
            raise UserError(
                f"image {absent[0]} has no candidate caption{_and_more(absent)}: "
                "caption every image that has references, or score against the references of fewer images"
            )
        if len(candidates) > len(image_ids):
            known = set(image_ids)
            strange = [image_id for image_id in candidates if image_id not in known]
            raise UserError(
                f"the candidate for image {strange[0]} has no references{_and_more(strange)}: "
                "check that captions and references belong to the same split"
            )
        tokens = [tokens_of(candidates[image_id], self._tokenizer) for image_id in image_ids]
        prepared = Candidates(tokens, self.references)
        found: dict[str, MetricScore] = {}
        signatures: dict[str, str] = {}
        for label, metric in self._metrics.items():
            for name, score in metric(prepared).items():
                if name in found:
                    raise UserError(f"two metrics report {name!r} (one is {label!r}); give each its own name")
                found[name], signatures[name] = score, self._sign([label])
        return Scores(
            {name: score.value for name, score in found.items()},
            {name: dict(zip(image_ids, score.images.tolist(), strict=True)) for name, score in found.items()},
            self.signature,
            (*self.warnings, *_candidate_warnings(tokens, candidates)),
            self._missing,
            signatures,
            found,
        )

    def _sign(self, labels: Sequence[str]) -> str:
        fewest, most = self.references.per_image.min(), self.references.per_image.max()
        return "|".join(
            [
                _VERSION,
                f"tok:{self._tokenizer.label}",
                f"refs:{fewest}" if fewest == most else f"refs:{fewest}-{most}",
                f"n:{len(self.references.image_ids)}",
                ",".join(labels),
            ]
        )


def _lines(warnings: str | Sequence[str]) -> Sequence[str]:
    return [warnings] if isinstance(warnings, str) else warnings


def _reference_warnings(references: References, metrics: Mapping[str, Metric], tokenizer: Tokenizer) -> list[str]:
    warnings = []
    bare = [image for image, texts in zip(references.image_ids, references.tokens, strict=True) if not any(texts)]
    if bare:
        warnings.append(
            f"{len(bare)} of {len(references.tokens)} images have only references without words (first: image "
            f"{bare[0]}); every caption of them scores 0: add captions, or remove these images"
        )
    empty = sum(not words for texts in references.tokens if any(texts) for words in texts)
    if empty:
        warnings.append(
            f"{empty} of {len(references.lengths)} references have no words; they lower CIDEr-D: remove them"
        )
    counts = Counter(word for texts in references.tokens for words in texts for word in words)
    if reason := why_unsegmented(counts, len(references.lengths), tokenizer):
        warnings.append(
            f"the references do not seem to be separated into words ({reason}): use the tokenizer characters, or put "
            f"blanks between words"
        )
    if _METEOR in metrics and not looks_english(counts):
        warnings.append("the references do not seem to be English; METEOR is for English: check that they are English")
    return warnings


def _candidate_warnings(tokens: Sequence[list[str]], candidates: Mapping[int, str]) -> list[str]:
    warnings = []
    empty = sum(not words for words in tokens)
    if empty:
        warnings.append(f"{empty} of {len(tokens)} candidates have no words; they score 0")
    broken = sum("\n" in caption for caption in candidates.values())
    if broken:
        warnings.append(f"{broken} of {len(tokens)} candidates contain newlines, which are treated as blanks")
    marked = [found[0] for caption in candidates.values() if (found := _MARKER.search(caption))]
    if marked:
        warnings.append(
            f"{len(marked)} of {len(tokens)} candidates contain a special token such as {marked[0]}, which is "
            "scored as a word: remove special tokens from the captions"
        )
    same = Counter(map(tuple, tokens)).most_common(1)[0][1] if tokens else 0
    if same == len(tokens) > 1:
        warnings.append(f"all {len(tokens)} images have the same caption")
    elif len(tokens) >= _MANY and 2 * same > len(tokens):
        warnings.append(f"{same} of {len(tokens)} images have the same caption")
    return warnings


_MANY = 10  # images; of fewer, the same caption for more than half of them can be chance


_MARKER = re.compile(
    r"\b(?:startseq|endseq)\b|<(?:unk|eos|bos|pad|s|/s|start|end|sos)>|\[(?:SEP|CLS|PAD|UNK)\]|<\|endoftext\|>",
    re.IGNORECASE,
)
_VERSION = f"imgcap-{__version__}"


def _and_more(image_ids: Sequence[int]) -> str:
    return f" (and {len(image_ids) - 1} more like it)" if len(image_ids) > 1 else ""
