"""``imgcap calibrate`` and ``imgcap export``: the confidence of captions, and a run as a folder to share."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.remote import shown


def calibrate(run: Any, decoding: Any, cache: Path, options: argparse.Namespace) -> int:
    """Fits the confidence and prints how good it is on captions that it was not fitted to.

    Raises:
        UserError: see ``run.confidence.calibrate`` and ``run.evaluation.sweep``.
    """
    from imgcap_jax.run.confidence import CONFIDENCE, FOLDS
    from imgcap_jax.run.confidence import calibrate as fit
    from imgcap_jax.run.evaluation import sweep

    if options.split == "train":
        raise UserError("confidence that is fitted to training captions is too high; choose another --split")
    evaluations = [
        next(sweep([run], options.split, cache=cache, dataset=dataset, decodings=[decoding], write=False))
        for dataset in options.dataset or [None]
    ]
    found = fit(evaluations)
    found.save(run.folder)
    print(f"right: CIDEr-D of at least {100 * found.threshold:.0f}; measured by {FOLDS}-fold cross-validation")
    for one in found.quality:
        print(
            f"{one.dataset} {one.split}: {one.images:,} captions, {one.right:.0%} right, AUROC {one.auroc:.3f}, "
            f"calibration error {one.calibration_error:.3f}"
        )
        for mean, share in one.bins:
            print(f"  confidence {mean:.2f}: {share:.0%} right")
    print(f"written: {shown(run.folder / CONFIDENCE)}")
    return 0


def export(run: Any, options: argparse.Namespace) -> int:
    """Writes the folder, with a model card.

    Raises:
        UserError: see ``export_run``.
    """
    from imgcap_jax.report.model_card import model_card
    from imgcap_jax.run.exporting import CARD, export_run

    export_run(run, options.folder, dtype=options.dtype)
    card = options.folder / CARD
    card.write_text(model_card(options.folder), encoding="utf-8")
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{shown(options.folder)}: {size / 1e6:.1f} MB; edit {CARD}, its model card, before you share it")
    print(f"next: {shlex.join(['imgcap', 'caption', 'photo.jpg', '--run', shown(options.folder)])}")
    return 0
