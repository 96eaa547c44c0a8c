"""The search for the best alignment of two sentences (Denkowski and Lavie, 2011, section 2.1).

Each word is covered by one match at most. The alignment wanted covers the most words of both sentences, then has the
fewest chunks (runs that are contiguous and in the same order in both), then the least distance between what is
matched. A beam of 40 goes through the reference from left to right.

The official tool decides many captions by how it breaks ties, so its order is kept in full: paths are sorted stably,
chunks are counted when they end, and the distance of a match is charged not to the path that takes it but to those
that are tried after it (matches further on in the list, and leaving the word out). It never matters how long a beam
has been, so all pairs go side by side, one array a quantity.

Letters: C pairs, M matches, P paths of all pairs (sorted by pair), Q new paths.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from imgcap_jax.metrics.corpus import expand
from imgcap_jax.metrics.meteor.matching import Matches

BEAM = 40
_PAIRS_AT_A_TIME = 4096
_NOTHING = -1


def align(matches: Matches, candidate_lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Which of the matches the best alignment of each pair takes.

    Args:
        matches: of all pairs, in the order of ``find_matches``.
        candidate_lengths, reference_lengths: words of each pair's sentences, [C].

    Returns:
        Sorted numbers of the matches taken.
    """
    definite = _definite(matches, candidate_lengths, reference_lengths)
    open_pairs = np.unique(matches.pair[~definite])
    in_search = np.zeros(len(reference_lengths), bool)
    in_search[open_pairs] = True
    chosen = [np.flatnonzero(definite & ~in_search[matches.pair])]
    # Like with like: a long sentence would make all others carry masks of its size.
    sizes = np.maximum(candidate_lengths, reference_lengths)[open_pairs]
    order = open_pairs[np.argsort(sizes, kind="stable")]
    for group in _groups(order, np.sort(sizes)):
        group = np.sort(group)
        mine = np.flatnonzero(np.isin(matches.pair, group))
        part = matches.take(mine)
        pair = np.searchsorted(group, part.pair)
        search = _Search(part, pair, definite[mine], candidate_lengths[group], reference_lengths[group])
        chosen.append(mine[search.run()])
    return np.sort(np.concatenate(chosen))


def _groups(pairs: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs that are searched side by side: thousands of short ones, few long ones."""
    begin = 0
    while begin < len(pairs):
        end = min(begin + _PAIRS_AT_A_TIME, len(pairs))
        # What a group keeps grows with the square of the length.
        while end > begin + 1 and (end - begin) * int(sizes[end - 1]) ** 2 > _PAIRS_AT_A_TIME * 32**2:
            end = begin + (end - begin + 1) // 2
        yield pairs[begin:end]
        begin = end


def _definite(matches: Matches, candidate_lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Matches that no other one touches in either sentence; they are taken without a search, [M]."""
    alone = np.ones(len(matches.pair), bool)
    for start, length, sizes in (
        (matches.start, matches.length, reference_lengths),
        (matches.other_start, matches.other_length, candidate_lengths),
    ):
        begin = (np.cumsum(sizes) - sizes)[matches.pair] + start
        match, word = expand(begin, length)
        covered = np.bincount(word, minlength=int(sizes.sum()))
        alone[match[covered[word] > 1]] = False
    return alone


@dataclass
class _Paths:
    """Paths of the search, sorted by pair.

    pair; covered: words covered in both sentences, as ``Matches.weight`` counts them; chunks that have ended;
    distance; end: the candidate's word after the last match, -1 where that is no longer next to what comes; position:
    the reference's word that is next; used: bits of the candidate's words that are taken [P, words of 64 bits].
    """

    pair: np.ndarray
    covered: np.ndarray
    chunks: np.ndarray
    distance: np.ndarray
    end: np.ndarray
    position: np.ndarray
    used: np.ndarray

    def take(self, rows: np.ndarray) -> "_Paths":
        return _Paths(*(values[rows] for values in vars(self).values()))

    def ranking(self) -> np.ndarray:
        """The rows, the best path of each pair first; equal ones stay in their order."""
        best = int(self.covered.max(initial=0))
        key, bits = self.pair, int(self.pair.max(initial=0)).bit_length()
        for quantity in (best - self.covered, self.chunks, self.distance):
            width = int(quantity.max(initial=0)).bit_length()
            key, bits = (key << width) | quantity, bits + width
        if bits > 63:
            return np.lexsort((self.distance, self.chunks, -self.covered, self.pair))
        return np.argsort(key, kind="stable")

    def place_in_pair(self) -> np.ndarray:
        """0, 1, 2, ... among the paths of the same pair."""
        return np.arange(len(self.pair)) - np.searchsorted(self.pair, self.pair)


class _Search:
    """The search over a group of pairs, which are numbered from 0."""

    def __init__(
        self,
        matches: Matches,
        pair: np.ndarray,
        definite: np.ndarray,
        candidate_lengths: np.ndarray,
        reference_lengths: np.ndarray,
    ) -> None:
        self._matches, self._definite, self._lengths = matches, definite, reference_lengths
        self._weight = matches.weight
        self._distance = np.abs(matches.start - matches.other_start)
        # Of each word of each reference, where the matches that begin there begin.
        self._first_word = np.cumsum(reference_lengths) - reference_lengths
        word = self._first_word[pair] + matches.start
        self._begin = np.searchsorted(word, np.arange(int(reference_lengths.sum()) + 1))
        self._spans = _bits(matches.other_start, matches.other_length, -(-int(candidate_lengths.max()) // 64))
        self._history: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self) -> np.ndarray:
        """Numbers of the matches that the best paths take."""
        pairs = len(self._lengths)
        zero, used = np.zeros(pairs, np.int64), np.zeros((pairs, self._spans.shape[1]), np.uint64)
        paths = _Paths(np.arange(pairs), zero, zero, zero, zero + _NOTHING, zero, used)
        parent, match, chosen = np.arange(pairs), np.full(pairs, _NOTHING), []
        for current in range(int(self._lengths.max(initial=0)) + 1):
            rows = paths.ranking()
            rows = rows[paths.take(rows).place_in_pair() < BEAM]
            paths = paths.take(rows)
            self._history.append((parent[rows], match[rows]))
            ends = self._lengths[paths.pair] == current
            chosen.append(self._trace(self._winners(paths, np.flatnonzero(ends))))
            further = np.flatnonzero(~ends)
            paths, parent, match = self._step(paths.take(further), current)
            parent = further[parent]
        return np.concatenate(chosen)

    def _winners(self, paths: _Paths, rows: np.ndarray) -> np.ndarray:
        """Of paths that have come to the end, the row of each pair's best, its last chunk ended."""
        done = paths.take(rows)
        done.chunks = done.chunks + (done.end != _NOTHING)
        order = done.ranking()
        return rows[order[done.take(order).place_in_pair() == 0]]

    def _trace(self, winners: np.ndarray) -> np.ndarray:
        """The matches that led to these rows of the paths ranked last."""
        at, found = winners, [np.zeros(0, np.int64)]
        for parent, match in reversed(self._history):
            found.append(match[at][match[at] != _NOTHING])
            at = parent[at]
        return np.concatenate(found)

    def _step(self, paths: _Paths, current: int) -> tuple[_Paths, np.ndarray, np.ndarray]:
        """All ways to go on from word `current` of the references.

        Returns:
            The new paths; the row each comes from; the match it takes, or -1.
        """
        inside = paths.position > current  # of a match that covers several words
        word = self._first_word[paths.pair] + current
        begin, end = self._begin[word], self._begin[word + 1]
        count = np.where(inside, 0, end - begin)
        forced = np.zeros(len(count), bool)
        forced[count == 1] = self._definite[begin[count == 1]]
        # Each match, and last of all to leave the word out.
        row, match = expand(begin, count + ~forced)
        leaves = match == (begin + count)[row]
        match = np.where(leaves, 0, match)
        free = leaves | ~(paths.used[row] & self._spans[match]).any(1)
        row, match, leaves = row[free], match[free], leaves[free]

        new = paths.take(row)
        takes = ~leaves
        breaks = (new.end != _NOTHING) & np.where(leaves, ~inside[row], self._matches.other_start[match] != new.end)
        new.chunks = new.chunks + breaks
        new.covered = new.covered + np.where(takes, self._weight[match], 0)
        new.used = np.where(takes[:, None], new.used | self._spans[match], new.used)
        charge = np.where(takes, self._distance[match], 0)
        before = np.cumsum(charge) - charge
        first = np.searchsorted(row, row)
        new.distance = new.distance + np.where(forced[row], charge, before - before[first])
        new.position = np.where(takes, current + self._matches.length[match], np.maximum(new.position, current + 1))
        ended = np.where(inside[row], new.end, _NOTHING)
        new.end = np.where(takes, self._matches.other_start[match] + self._matches.other_length[match], ended)
        return new, row, np.where(takes, match, _NOTHING)


def _bits(start: np.ndarray, length: np.ndarray, words: int) -> np.ndarray:
    """Bits start, ..., start + length - 1 as integers of 64 bits, [M, words]."""
    base = 64 * np.arange(words)

    def below(bit: np.ndarray) -> np.ndarray:
        within = np.clip(bit[:, None] - base, 0, 64)
        all_bits = ~np.uint64(0)
        return np.where(within == 64, all_bits, ~(all_bits << np.minimum(within, 63).astype(np.uint64)))

    return below(start + length) ^ below(start)
