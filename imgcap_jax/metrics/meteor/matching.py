"""All possible matches between words and phrases of candidates and references.

There are four matchers, in this order: identical words; words with the same stem; words with a common synset; phrases
that the table of paraphrases lists, in either direction. Each image has one candidate. A pair consists of a candidate
and one reference of its image. The index of the pair is the index of the reference.

Letters: S sentences, W words of all sentences, C pairs, M matches, Y different words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from imgcap_jax.metrics.corpus import distinct, expand, join, pairs, unpair, words_left
from imgcap_jax.metrics.meteor.stemmer import stem
from imgcap_jax.metrics.meteor.tables import Tables

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
MATCHERS = 4


class Words:
    """Ids and properties of the different words of all texts.

    New words are added when they first occur.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._number: dict[str, int] = {}
        self._stem_number: dict[str, int] = {}
        self._stem: list[int] = []
        self._known: list[int] = []
        self._function: list[bool] = []
        self._synsets: list[set[int]] = []
        self._graphs: tuple[int, tuple[Graph, Graph]] | None = None  # number of words, graphs

    def numbers(self, sentences: Sequence[Sequence[str]]) -> np.ndarray:
        """The ids of the words of all sentences, [W]. New words are added."""
        number = self._number
        for word in {word for sentence in sentences for word in sentence if word not in number}:
            self._learn(word)
        return np.array([number[word] for sentence in sentences for word in sentence], np.int64)

    def _learn(self, word: str) -> None:
        self._number[word] = len(self._number)
        known = self.tables.number.get(word, -1)
        self._known.append(known)
        self._function.append(known >= 0 and bool(self.tables.function[known]))
        self._stem.append(self._stem_number.setdefault(stem(word), len(self._stem_number)))
        self._synsets.append(self.tables.synsets(word))

    @property
    def function(self) -> np.ndarray:
        """Whether each word is a function word, [Y]."""
        return np.array(self._function, bool)

    @property
    def known(self) -> np.ndarray:
        """The id of each word in the tables, or -1 if they do not contain it, [Y]."""
        return np.array(self._known, np.int64)

    def graphs(self) -> tuple["Graph", "Graph"]:
        """Edges between different words with the same stem, and between different words with a common synset."""
        known = len(self._stem)
        if self._graphs is None or self._graphs[0] != known:
            counts = [len(synsets) for synsets in self._synsets]
            synsets = np.array([synset for synsets in self._synsets for synset in synsets], np.int64)
            same_stem = Graph.of_words_that_share(np.arange(known), np.array(self._stem, np.int64))
            synonyms = Graph.of_words_that_share(np.repeat(np.arange(known), counts), synsets)
            self._graphs = known, (same_stem, synonyms)
        return self._graphs[1]


class Graph(NamedTuple):
    """Edges between ids.

    Attributes:
        source: the id at which each edge begins, sorted.
        target: the id at which each edge ends.
        rank: the position of the edge in the table of paraphrases, or 0.
    """

    source: np.ndarray
    target: np.ndarray
    rank: np.ndarray

    @classmethod
    def of_words_that_share(cls, word: np.ndarray, key: np.ndarray) -> "Graph":
        """Edges in both directions between different words that have a common key."""
        order = np.argsort(key, kind="stable")
        word, key = word[order], key[order]
        entry, other = join(key, key)
        source, target = unpair(distinct(pairs(word[entry], word[other])))
        different = source != target
        return cls(source[different], target[different], np.zeros(different.sum(), np.int64))

    def reversed(self) -> "Graph":
        """The same edges in the opposite direction."""
        order = np.argsort(self.target, kind="stable")
        return Graph(self.target[order], self.source[order], self.rank[order])


@dataclass(frozen=True)
class Sentences:
    """Sentences as word ids.

    Attributes:
        words: the ids of the words of all sentences, [W].
        lengths: the number of words in each sentence, [S].
        image: the image of each sentence, [S].
    """

    words: np.ndarray
    lengths: np.ndarray
    image: np.ndarray

    @cached_property
    def first(self) -> np.ndarray:
        """The position of the first word of each sentence, [S]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def sentence(self) -> np.ndarray:
        """The sentence that each word belongs to, [W]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


class _Spans(NamedTuple):
    """Parts of sentences.

    Attributes:
        sentence: the sentence of each span.
        image: the image of that sentence.
        start: the position of the first word in the sentence.
        length: the number of words.
        what: the id of the word or the node of the phrase.
    """

    sentence: np.ndarray
    image: np.ndarray
    start: np.ndarray
    length: np.ndarray
    what: np.ndarray


def _spans(sentences: Sentences, first_word: np.ndarray, length: np.ndarray, what: np.ndarray) -> _Spans:
    sentence = sentences.sentence[first_word]
    return _Spans(sentence, sentences.image[sentence], first_word - sentences.first[sentence], length, what)


def _phrases(sentences: Sentences, words: Words) -> _Spans:
    """All spans that are a node in the tables' tree of phrases."""
    found = list(words.tables.nodes(words.known[sentences.words], words_left(sentences.lengths)))
    length = np.repeat(np.arange(1, len(found) + 1), [len(place) for place, _ in found])
    place, node = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return _spans(sentences, place, length, node)


@dataclass(frozen=True)
class Matches:
    """Matches, sorted by pair, then by start in the reference, then by the order in which the search tries them.

    Attributes:
        pair: the pair, [M].
        module: the matcher: EXACT, STEM, SYNONYM or PARAPHRASE, [M].
        start, length: the first word and the number of words in the reference, [M].
        other_start, other_length: the first word and the number of words in the candidate, [M].
    """

    pair: np.ndarray
    module: np.ndarray
    start: np.ndarray
    length: np.ndarray
    other_start: np.ndarray
    other_length: np.ndarray

    def take(self, chosen: np.ndarray) -> "Matches":
        """The matches selected by indices or by a mask."""
        return Matches(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def together(cls, parts: Sequence["Matches"]) -> "Matches":
        """Concatenates the matches of all parts."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @cached_property
    def weight(self) -> np.ndarray:
        """The number of covered words in both sentences that the search counts for each match, [M].

        Words that are not identical count half, rounded down in each sentence. A match of single words counts 0.
        """
        half = self.length // 2 + self.other_length // 2
        return np.where(self.module == EXACT, self.length + self.other_length, half)


def find_matches(candidates: Sentences, references: Sentences, words: Words) -> Matches:
    """All matches of each candidate with each reference of its image."""
    ours, theirs = (
        _spans(sentences, np.arange(len(sentences.words)), np.ones_like(sentences.words), sentences.words)
        for sentences in (candidates, references)
    )
    exact = _matches(ours, theirs, EXACT, *_join(ours, theirs, None)[:2])
    # If a candidate equals the reference, only identical words are matched.
    straight = np.bincount(exact.pair[exact.start == exact.other_start], minlength=len(references.lengths))
    length = candidates.lengths[references.image]
    equal = (references.lengths == length) & (straight == length)

    found = [exact]
    for module, graph in zip((STEM, SYNONYM), words.graphs(), strict=True):
        found.append(_matches(ours, theirs, module, *_join(ours, theirs, graph)[:2]))
    found += _paraphrases(_phrases(candidates, words), _phrases(references, words), words.tables)
    matches = Matches.together(found)
    matches = matches.take(~equal[matches.pair] | (matches.module == EXACT))
    return matches.take(np.argsort(pairs(matches.pair, matches.start), kind="stable"))


def _paraphrases(candidates: _Spans, references: _Spans, tables: Tables) -> list[Matches]:
    """Paraphrases that the table lists from reference to candidate, then those from candidate to reference."""
    ours, theirs = np.unique(candidates.what), np.unique(references.what)
    there = _edges(theirs, ours, tables).reversed()
    ours_of, theirs_of, rank = _join(candidates, references, there)
    order = np.lexsort((candidates.start[ours_of], rank, references.length[theirs_of]))
    first = _matches(candidates, references, PARAPHRASE, ours_of[order], theirs_of[order])
    ours_of, theirs_of, rank = _join(candidates, references, _edges(ours, theirs, tables))
    order = np.lexsort((rank, candidates.length[ours_of], candidates.start[ours_of]))
    return [first, _matches(candidates, references, PARAPHRASE, ours_of[order], theirs_of[order])]


def _edges(sources: np.ndarray, targets: np.ndarray, tables: Tables) -> Graph:
    """The edges of the table of paraphrases from one set of phrases to another."""
    wanted = np.zeros(len(tables.paraphrase_start) - 1, bool)
    wanted[targets] = True
    start = tables.paraphrase_start[sources]
    entry, place = expand(start, tables.paraphrase_start[sources + 1] - start)
    target = np.asarray(tables.paraphrase[place])
    chosen = wanted[target]
    return Graph(sources[entry[chosen]], target[chosen].astype(np.int64), place[chosen])


def _join(candidates: _Spans, references: _Spans, graph: Graph | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins candidate and reference spans of the same image that are equal or connected by an edge.

    Args:
        candidates: spans of the candidates.
        references: spans of the references.
        graph: edges from candidate spans to reference spans. None joins equal spans.

    Returns:
        The indices in `candidates`, in ascending order; the indices in `references`; the ranks of the edges.
    """
    what, rank = candidates.what, np.zeros(len(candidates.what), np.int64)
    entry = np.arange(len(what))
    if graph is not None:
        entry, edge = join(what, graph.source)
        what, rank = graph.target[edge], graph.rank[edge]
    keys = pairs(references.image, references.what)
    order = np.argsort(keys, kind="stable")
    run, place = join(pairs(candidates.image[entry], what), keys[order])
    return entry[run], order[place], rank[run]


def _matches(candidates: _Spans, references: _Spans, module: int, ours: np.ndarray, theirs: np.ndarray) -> Matches:
    return Matches(
        references.sentence[theirs],
        np.full(len(theirs), module),
        references.start[theirs],
        references.length[theirs],
        candidates.start[ours],
        candidates.length[ours],
    )
