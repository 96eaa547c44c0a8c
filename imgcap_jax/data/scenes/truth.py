"""Truth scores for captions of drawn scenes: the second metric of the built-in dataset, in addition to CIDEr-D."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

import numpy as np

from imgcap_jax.data.scenes.language import facts, is_true, parse_caption
from imgcap_jax.data.scenes.world import Scene

Id = TypeVar("Id", bound=Hashable)


@dataclass(frozen=True)
class TruthScores:
    """How true captions are of their scenes. Shares are 0..1.

    Attributes:
        captions: number of captions.
        true: share of captions that are entirely true. A caption that cannot be parsed is not true.
        parseable: share of captions that the grammar covers.
        facts: mean number of facts per caption, true or not; 0 for a caption that cannot be parsed.
        fact_ratio: `facts` divided by the mean of the references (averaged per image first).
        discrimination: how well a caption identifies its own scene among ten similar ones, its own and nine others
            of the split. Mean over captions of 1/k if the caption is true of its own scene and of k - 1 others, and
            of 0 if it is false of its own.
    """

    captions: int
    true: float
    parseable: float
    facts: float
    fact_ratio: float
    discrimination: float


def judge(
    captions: Mapping[Id, str], scenes: Mapping[Id, Scene], references: Mapping[Id, Sequence[str]]
) -> TruthScores:
    """Computes the truth scores of captions.

    `scenes` must be those of the whole split, because the similar scenes for `discrimination` are taken from them.

    Raises:
        ValueError: there are no captions, or the image of a caption has no scene or no references.
    """
    missing = [i for i in captions if i not in scenes or not references.get(i)]
    if not captions or missing:
        raise ValueError(f"no captions to judge, or images without scene or references: {missing[:5]}")
    statements = {i: parse_caption(caption) for i, caption in captions.items()}
    true = {i: is_true(statement, scenes[i]) for i, statement in statements.items()}
    stated = float(np.mean([facts(s) if s is not None else 0 for s in statements.values()]))
    of_references = float(np.mean([np.mean([_facts_of(text) for text in references[i]]) for i in captions]))
    rivals = similar_scenes(scenes, [i for i in captions if true[i]])
    picked = {i: 1 / (1 + sum(is_true(statements[i], scenes[j]) for j in rivals[i])) for i in rivals}
    return TruthScores(
        captions=len(captions),
        true=sum(true.values()) / len(captions),
        parseable=sum(s is not None for s in statements.values()) / len(captions),
        facts=stated,
        fact_ratio=stated / of_references,
        discrimination=sum(picked.values()) / len(captions),
    )


def _facts_of(reference: str) -> int:
    statement = parse_caption(reference)
    if statement is None:
        raise ValueError(f"the grammar of scenes does not cover the reference {reference!r}")
    return facts(statement)


def similar_scenes(scenes: Mapping[Id, Scene], of: Sequence[Id], count: int = 9) -> dict[Id, list[Id]]:
    """For each scene in `of`, its `count` most similar other scenes (or all, if there are fewer), most similar first.

    Scenes with the same number of objects come first, sorted by the number of attributes (shape, colour, size,
    texture) that the objects share under the best one-to-one matching. Ties are broken by the ids as text. Scenes
    with other numbers of objects follow, the closest number first.
    """
    codes: dict[str, int] = {}
    by_number: dict[int, tuple[list[Id], np.ndarray]] = {}
    for number in {len(scene.objects) for scene in scenes.values()}:
        ids = sorted((i for i, scene in scenes.items() if len(scene.objects) == number), key=str)
        rows = [[(o.shape, o.colour, o.size, o.texture) for o in scenes[i].objects] for i in ids]
        coded = [[[codes.setdefault(v, len(codes)) for v in o] for o in row] for row in rows]
        by_number[number] = ids, np.array(coded)  # [scenes, objects, 4]
    result: dict[Id, list[Id]] = {}
    for i in of:
        own = len(scenes[i].objects)
        nearest: list[Id] = []
        for number in sorted(by_number, key=lambda number: (abs(number - own), number)):
            ids, others = by_number[number]
            if number != own:
                nearest += ids
            else:
                mine = others[ids.index(i)]
                shared = (mine[:, None] == others[:, None]).sum(-1)  # [scenes, objects, objects]
                orders = np.array(list(permutations(range(own))))
                best = shared[:, np.arange(own), orders].sum(-1).max(-1) if own else np.zeros(len(ids))
                nearest += [ids[j] for j in np.argsort(-best, kind="stable") if ids[j] != i]
            if len(nearest) >= count:
                break
        result[i] = nearest[:count]
    return result
