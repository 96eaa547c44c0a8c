"""Scoring candidate captions against references.

A metric is a function that takes references and returns a function that scores candidates; to add one, add it to
`available_metrics`.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version

from imgcap_jax.errors import UserError
from imgcap_jax.metrics import bleu, cider, rouge
from imgcap_jax.metrics.corpus import Candidates, MetricScore, MetricScores, References
from imgcap_jax.metrics.meteor import metric as meteor
from imgcap_jax.metrics.meteor.tables import HOW_TO_ADD, package_folder
from imgcap_jax.text import tokenize

Metric = Callable[[References], Callable[[Candidates], MetricScores]]
_METEOR = "METEOR:1.5-en-norm"
_OWN_IDF = "idf=references"


def available_metrics(
    idf: Mapping[int, Sequence[str]] | None = None, *, idf_name: str = "corpus", original_cider: bool = False
) -> dict[str, Metric]:
    """The metrics that can be computed here, by name and parameters as they stand in signatures.

    Args:
        idf: image id -> captions of a corpus that document frequencies are to come from; None: the references.
        idf_name: what signatures call that corpus; the number of its images and a digest of its words are added.
        original_cider: CIDEr as first defined too, beside CIDEr-D.

    Raises:
        UserError: the corpus has fewer than two images, so that every idf would be 0.
    """
    corpus, source = None, _OWN_IDF
    if idf is not None:
        if len(idf) < 2:
            raise UserError(f"document frequencies need a corpus of two images or more, and {idf_name} has {len(idf)}")
        corpus = References.from_captions(idf).tokens
        digest = hashlib.sha256("\n".join(" ".join(text) for texts in corpus for text in texts).encode()).hexdigest()
        source = f"idf={re.sub('[^A-Za-z0-9._-]', '_', idf_name)}-{len(corpus)}-{digest[:8]}"
    vectors = cache(partial(cider.Vectors, corpus=corpus))  # shared by both of them
    found: dict[str, Metric] = {"BLEU:closest": bleu.prepare}
    if not missing_metrics():
        found[_METEOR] = meteor.prepare
    found[f"ROUGE-L:b{rouge.BETA:g}"] = rouge.prepare
    found[f"CIDEr-D:s{cider.SIGMA:g}:{source}"] = lambda references: cider.score_clipped(vectors(references))
    if original_cider:
        found[f"CIDEr:unclipped:{source}"] = lambda references: cider.score_original(vectors(references))
    return found


def missing_metrics() -> dict[str, str]:
    """Metrics that can't be computed here, and the command that adds each."""
    return {} if package_folder() else {"METEOR": HOW_TO_ADD}


@dataclass(frozen=True)
class Scores:
    """Scores of a set of candidates.

    Attributes:
        values: metric -> score of the corpus, 0 to 1 (CIDEr 0 to 10); papers print them times 100.
        per_image: metric -> image id -> score.
        signature: how the scores were computed, in the manner of sacreBLEU; scores of different signatures
            can't be compared.
        warnings: one line for each thing that makes the scores less than they seem.
        missing: metrics that could not be computed, and the command that adds each.
        signatures: metric -> the signature of that metric alone.
        metrics: metric -> what its score is computed from, for comparisons.
    """

    values: dict[str, float]
    per_image: dict[str, dict[int, float]]
    signature: str
    warnings: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, MetricScore] = field(default_factory=dict, repr=False, compare=False)


class CaptionScorer:
    """Scores candidates against references that are tokenised and counted once.

    Args:
        references: image id -> raw captions; which images they are decides the idf of CIDEr-D.
        metrics: the metrics to compute; None: ``available_metrics()``.

    Attributes:
        references: tokenised.

    Raises:
        UserError: no image, or an image without a reference.
    """

    def __init__(
        self,
        references: Mapping[int, Sequence[str]],
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        if not references:
            raise UserError("no references to score against: choose a split or file that has captions")
        bare = [image_id for image_id, captions in references.items() if not captions]
        if bare:
            raise UserError(
                f"image {bare[0]} has no reference{_and_more(bare)}: add captions, or leave it out of the references"
            )
        metrics = available_metrics() if metrics is None else metrics
        self._missing = missing_metrics()
        self.references = References.from_captions(references)
        self._metrics = {label: prepare(self.references) for label, prepare in metrics.items()}
        self.signature = self._sign(list(metrics))

    def score(self, candidates: Mapping[int, str]) -> Scores:
        """Scores one candidate for every image.

        Raises:
            UserError: an image has no candidate, or a candidate no references.
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
        tokens = [tokenize(candidates[image_id]) for image_id in image_ids]
        prepared = Candidates(tokens, self.references)
        found: dict[str, MetricScore] = {}
        signatures: dict[str, str] = {}
        for label, metric in self._metrics.items():
            for name, score in metric(prepared).items():
                found[name], signatures[name] = score, self._sign([label])
        return Scores(
            {name: score.value for name, score in found.items()},
            {name: dict(zip(image_ids, score.images.tolist(), strict=True)) for name, score in found.items()},
            self.signature,
            self._warnings(tokens, candidates),
            self._missing,
            signatures,
            found,
        )

    def _sign(self, labels: Sequence[str]) -> str:
        fewest, most = self.references.per_image.min(), self.references.per_image.max()
        return "|".join(
            [
                _VERSION,
                "tok:ptb-coco",
                f"refs:{fewest}" if fewest == most else f"refs:{fewest}-{most}",
                f"n:{len(self.references.image_ids)}",
                ",".join(labels),
            ]
        )

    def _warnings(self, tokens: Sequence[list[str]], candidates: Mapping[int, str]) -> tuple[str, ...]:
        warnings = []
        if len(tokens) == 1 and any(_OWN_IDF in label for label in self._metrics):
            warnings.append("CIDEr-D is 0 with one image, as all its words then have an idf of 0: score more images")
        empty = sum(not words for words in tokens)
        if empty:
            warnings.append(f"{empty} of {len(tokens)} candidates have no words; they score 0")
        broken = sum("\n" in caption for caption in candidates.values())
        if broken:
            warnings.append(f"{broken} of {len(tokens)} candidates hold newlines, which were read as blanks")
        marked = [found[0] for caption in candidates.values() if (found := _MARKER.search(caption))]
        if marked:
            warnings.append(
                f"{len(marked)} of {len(tokens)} candidates hold a model's own token such as {marked[0]}, which is "
                "scored as a word: cut captions at their end before they are written"
            )
        if len(tokens) > 1 and len(set(map(tuple, tokens))) == 1:
            warnings.append(f"all {len(tokens)} candidates are the same caption")
        return tuple(warnings)


_MARKER = re.compile(
    r"\b(?:startseq|endseq)\b|<(?:unk|eos|bos|pad|s|/s|start|end|sos)>|\[(?:SEP|CLS|PAD|UNK)\]|<\|endoftext\|>",
    re.IGNORECASE,
)
_VERSION = f"imgcap-{version('imgcap_jax')}"


def _and_more(image_ids: Sequence[int]) -> str:
    return f" (and so for {len(image_ids) - 1} more)" if len(image_ids) > 1 else ""
