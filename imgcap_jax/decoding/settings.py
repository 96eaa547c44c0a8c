"""Settings of a search, or of sampling."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from imgcap_jax.decoding.limits import check_limits
from imgcap_jax.decoding.rules import Rule
from imgcap_jax.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How captions are searched for, or drawn.

    Raises:
        UserError: a value is out of range, or settings do not go together.
    """

    beam: int = 3
    """Number of beams; 1 is greedy search."""
    length_norm: float = 0.7
    """Captions are ranked by log-probability / penalty ** length_norm; 0: no penalty, 1 with power: the mean per
    word."""
    length_penalty: Literal["power", "gnmt"] = "power"
    """power: the length; gnmt: (5 + length) / 6 (Wu et al. 2016)."""
    n_best: int = 1
    """Captions returned per image. A search for fewer captions finishes sooner."""
    max_words: int = 20
    """The longest caption; an unfinished one is cut there."""
    min_words: int = 0
    """The shortest caption."""
    suppress_unk: bool = True
    """Never write <unk>."""
    no_repeat_ngram: int = 0
    """No n-gram of this size occurs twice in a caption (3: trigram blocking); 0: off."""
    forbid_bad_endings: bool = False
    """No caption ends on a word such as "a", "of" or "with"."""
    forbid_repeated_words: bool = False
    """No caption repeats a word as in "a car in a car" or "a baby is playing with a baby" (English)."""
    prefix: str = ""
    """The first words of every caption."""
    must: tuple[str, ...] = ()
    """Words that must occur in every caption, each with alternative forms, as in "dog|dogs" (constrained beam
    search)."""
    groups: int = 1
    """Groups of beams that avoid each other's words (diverse beam search); beam must be divisible by it."""
    diversity: float = 0.5
    """How much a word's score is lowered for each earlier group that has just chosen it."""
    samples: int = 0
    """Number of captions drawn per image, in place of a search; 0: search."""
    temperature: float = 1.0
    """Temperature of samples: below 1 favours likely words, above 1 rare ones."""
    top_k: int = 0
    """Samples draw from the k most likely words; 0: from all."""
    top_p: float = 1.0
    """Samples draw from the most likely words whose probabilities add up to p; 1: from all."""
    seed: int = 0
    """Seed of samples. What is drawn for an image depends on it and on the image's place in the split."""
    mirror: bool = False
    """The decoder also sees the regions of the mirror image of the photo. It encodes twice as many images."""
    rerank: Literal["none", "mbr", "consensus"] = "none"
    """mbr: of all beams or samples, return the captions that agree most with the others (minimum Bayes risk).
    consensus: the decoder writes nothing; of the captions of the nearest training photos (mbr_neighbours), return those
    that agree most with the others (Devlin et al. 2015)."""
    mbr_cider: float = 1.0
    """Weight of CIDEr-D (0 to 10, with document frequencies of the training captions) in the agreement."""
    mbr_bleu: float = 0.0
    """Weight of smoothed BLEU-4 (0 to 1) in the agreement."""
    mbr_temperature: float = 1.0
    """The scores of a search, divided by it, are the logits of the captions' probabilities; large: all count alike."""
    mbr_neighbours: int = 0
    """The captions of this many nearest training photos also count in the agreement (Devlin et al. 2015)."""
    mbr_neighbours_weight: float = 0.5
    """Their share of the agreement; the rest belongs to the beams or samples."""
    pool: bool = False
    """Each model of an ensemble writes captions of its own, and rerank chooses among all of them. Otherwise their
    probabilities are averaged."""
    rules: tuple[Rule, ...] = ()
    """Your own logit rules, applied after the others in this order."""

    def plain(self, beam: int) -> "Decoding":
        """The same lengths and rules, by plain beam search, without the mirror image."""
        others = (
            "n_best",
            "groups",
            "diversity",
            "must",
            "samples",
            "temperature",
            "top_k",
            "top_p",
            "seed",
            "mirror",
            *_OF_RERANK,
        )
        return replace(self, beam=beam, **{name: _DEFAULTS[name] for name in others})

    def __post_init__(self) -> None:
        check_limits(
            beam=self.beam,
            groups=self.groups,
            n_best=self.n_best,
            max_words=self.max_words,
            min_words=self.min_words,
            length_norm=self.length_norm,
            no_repeat_ngram=self.no_repeat_ngram,
            diversity=self.diversity,
            samples=self.samples,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            mbr_cider=self.mbr_cider,
            mbr_bleu=self.mbr_bleu,
            mbr_temperature=self.mbr_temperature,
            mbr_neighbours=self.mbr_neighbours,
            mbr_neighbours_weight=self.mbr_neighbours_weight,
        )
        if self.length_penalty not in ("power", "gnmt"):
            raise UserError(f"length_penalty is {self.length_penalty!r}; it must be power or gnmt")
        if self.min_words > self.max_words:
            raise UserError(f"min_words is {self.min_words}, above max_words ({self.max_words}); use a smaller value")
        if self.n_best > self.beam and not self.samples:
            raise UserError(f"n_best is {self.n_best}, but beam is {self.beam}; use a smaller n_best or more beams")
        constrained, drawn = bool(self.must), self.samples > 0
        if constrained + drawn + (self.groups > 1) > 1:
            raise UserError("must, groups above 1 and samples are three kinds of decoding; use one of them")
        for name in ("temperature", "top_k", "top_p", "seed"):
            if not drawn and getattr(self, name) != _DEFAULTS[name]:
                raise UserError(f"{name} only affects samples; set samples as well")
        self._check_rerank()
        if drawn and self.n_best > 1 and self.rerank == "none":
            raise UserError("n_best only affects searches; all samples are returned")
        if drawn and self.n_best > self.samples:
            raise UserError(f"n_best is {self.n_best}, but samples is {self.samples}; use a smaller n_best")
        if self.groups == 1 and self.diversity != _DEFAULTS["diversity"]:
            raise UserError("diversity only affects groups of beams; set groups as well")
        for rule in self.rules:
            if not callable(rule) or not getattr(rule, "__hash__", None):
                raise UserError(
                    f"decoding.rules: {rule!r} is not a rule; a rule is a frozen dataclass with __call__, see "
                    f"imgcap_jax.decoding.rules"
                )

    def _check_rerank(self) -> None:
        if self.rerank not in ("none", "mbr", "consensus"):
            raise UserError(f"rerank is {self.rerank!r}; it must be none, mbr or consensus")
        if self.rerank == "none":
            for name in _OF_RERANK:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise UserError(f"{name} only affects rerank; set rerank to mbr as well")
            return
        if not self.mbr_cider + self.mbr_bleu:
            raise UserError("mbr_cider and mbr_bleu are both 0; set one of them")
        if not self.mbr_neighbours and self.mbr_neighbours_weight != _DEFAULTS["mbr_neighbours_weight"]:
            raise UserError("mbr_neighbours_weight only affects mbr_neighbours; set mbr_neighbours as well")
        if self.mbr_neighbours and not self.mbr_neighbours_weight:
            raise UserError("mbr_neighbours has no effect if mbr_neighbours_weight is 0; leave both out")
        if self.samples and self.mbr_temperature != _DEFAULTS["mbr_temperature"]:
            raise UserError("mbr_temperature has no effect on samples, which all count alike; leave it out")
        if self.rerank == "consensus":
            if not self.mbr_neighbours:
                raise UserError("rerank is consensus, but mbr_neighbours is 0; set it to the number of photos, as 20")
            for name in ("pool", "must", "prefix", "samples", "mbr_temperature", "mbr_neighbours_weight"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise UserError(f"{name} has no effect on consensus, which searches nothing; leave it out")
        elif not self.pool and (self.samples or self.beam) < 2:
            raise UserError("rerank chooses among the beams or samples of an image, of which there is one; use more")

    @property
    def returned(self) -> int:
        """The number of captions per image that are returned, if there are as many."""
        return self.samples if self.samples and self.rerank == "none" else self.n_best

    @property
    def title(self) -> str:
        """The search in a few words: its kind, the length norm, and all settings that differ from the defaults."""
        if self.rerank == "consensus":
            return f"consensus of {self.mbr_neighbours} neighbours"
        kind = "greedy" if self.beam == 1 and not self.must else f"beam {self.beam}"
        if self.samples:
            kind = f"{self.samples} samples" if self.samples > 1 else "sampled"
        stated = {"beam", "samples", "n_best", "length_norm"}
        if kind == "greedy" or self.samples:
            stated |= {"length_penalty"}
        else:
            kind = f"{kind}, length_norm {self.length_norm}"
        more = [
            f"{item.name} {_as_text(getattr(self, item.name))}"
            for item in fields(self)
            if item.name not in stated and getattr(self, item.name) != item.default
        ]
        return ", ".join([kind, *more])


_OF_RERANK = (
    "rerank",
    "mbr_cider",
    "mbr_bleu",
    "mbr_temperature",
    "mbr_neighbours",
    "mbr_neighbours_weight",
    "pool",
)
_DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(Decoding)}


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
