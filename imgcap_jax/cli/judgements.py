"""``imgcap score --judgements``: correlates metrics with human ratings."""

import argparse

from imgcap_jax.errors import UserError
from imgcap_jax.tokenizers import Tokenizer


def judge(options: argparse.Namespace, tokenizer: Tokenizer) -> int:
    """Runs the command; returns the exit code."""
    from imgcap_jax.metrics.judgement_files import judge_metrics
    from imgcap_jax.report.judgements import lines

    for name in ("compare", "training", "samples", "mbr", "mbr_bleu", "mbr_output", "images"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect with --judgements; leave it out")
    report = judge_metrics(
        options.captions,
        options.references,
        idf=options.idf,
        with_spice=options.spice,
        with_objects=options.objects,
        instances=options.instances,
        tokenizer=tokenizer,
        bootstrap=options.bootstrap,
        output=options.json,
    )
    print("\n".join(lines(report)))
    if options.json is not None:
        report.write(options.json)
        print(f"scores per pair: {options.json}")
    return 0
