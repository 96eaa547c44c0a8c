"""The valid ranges of decoding settings, stated once for the settings, the searches and the rules."""

from imgcap_jax.errors import UserError, check_range

_AT_LEAST = {
    "beam": 1,
    "groups": 1,
    "n_best": 1,
    "max_words": 1,
    "max_steps": 1,
    "min_words": 0,
    "length_norm": 0,
    "no_repeat_ngram": 0,
    "diversity": 0,
    "samples": 0,
    "top_k": 0,
    # Below this temperature, a word that is only unlikely would count as forbidden.
    "temperature": 0.01,
    "mbr_cider": 0,
    "mbr_bleu": 0,
    "mbr_temperature": 0.01,
    "mbr_neighbours": 0,
}


def check_limits(**values: float | None) -> None:
    """Checks settings by name; None is always valid.

    Raises:
        UserError: a value is out of its range, or ``beam`` is not a multiple of ``groups``.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name == "top_p":
            check_range(name, value, above=0, at_most=1)
        elif name == "mbr_neighbours_weight":
            check_range(name, value, at_least=0, at_most=1)
        else:
            check_range(name, value, at_least=_AT_LEAST[name])
    beam, groups = values.get("beam"), values.get("groups")
    if beam is not None and groups is not None and beam % groups:
        raise UserError(f"beam is {beam}; it must be a multiple of groups ({groups})")
