"""``imgcap caption``: captions photos with a loaded model."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    if options.attention_dir is not None and not options.attention:
        raise UserError("--attention-dir has no effect without --attention; give both")
    if options.resume and options.csv is None and not options.sidecar:
        raise UserError("--resume needs --csv or --sidecar, which say what has been captioned; add one of them")
    if options.resume and (options.html is not None or options.results is not None):
        raise UserError("--html and --results contain the photos of one call only; leave out --resume")
    if options.overwrite and options.resume:
        raise UserError("--resume keeps what is there, and --overwrite replaces it; leave out one of them")
    files = [options.csv, options.html, options.results]
    given = [file.absolute() for file in files if file is not None]
    if len(set(given)) < len(given):
        raise UserError("two outputs are the same file; give each its own")
    if options.overwrite and not (given or options.sidecar or options.write_exif):
        raise UserError("--overwrite has no effect without an output that is a file; leave it out")
    for file in files:
        kept = options.overwrite or (options.resume and file == options.csv)
        if file is not None and os.path.lexists(file) and not kept:
            also = ", and --resume adds to it" if file == options.csv else ""
            raise UserError(f"{file} exists; --overwrite replaces it{also}")


def caption(captioner: Any, files: Sequence[Path], options: argparse.Namespace) -> int:
    """Captions the files.

    Returns:
        The exit code: 2 if a photo was left out, or if an output lacks one.

    Raises:
        UserError: an output can't be written.
    """
    from imgcap_jax.captioning.files import caption_files
    from imgcap_jax.captioning.metadata import Metadata
    from imgcap_jax.captioning.outputs import CocoResults, Gallery, Lines, Output, Pictures, Sidecars, Table

    given = [file.absolute() for file in (options.csv, options.html, options.results) if file is not None]
    for path in files:
        if path.absolute() in given:
            raise UserError(f"{path} is a photo, and an output; give the output another name")
    # Outputs that refuse photos come first, and the table last: it says which photos are done in all of them.
    outputs: list[Output] = []
    if options.results is not None:
        outputs.append(CocoResults(options.results, files))
    if options.html is not None:
        outputs.append(Gallery(captioner, options.html, files))
    if options.write_exif:
        outputs.append(Metadata(overwrite=options.overwrite))
    sidecars = Sidecars(overwrite=options.overwrite) if options.sidecar else None
    outputs += [] if sidecars is None else [sidecars]
    pictures = None
    if options.attention and (options.attention_dir is not None or options.html is None):
        pictures = Pictures(captioner, options.attention_dir or Path(), files)
        outputs.append(pictures)
    table = None if options.csv is None else Table(options.csv, resume=options.resume)
    outputs += [] if table is None else [table]
    if options.resume:
        before = len(files)
        done = table if table is not None else sidecars
        assert done is not None
        files = [path for path in files if not done.has(path)]
        print(f"imgcap: {before - len(files):,} of {before:,} photos are done", file=sys.stderr)
    quiet = not options.json and any((options.csv, options.html, options.sidecar, options.write_exif))
    if not quiet:
        outputs.append(Lines(as_json=options.json, pictures=pictures))
    bad = 0
    for line, failed in caption_files(captioner, files, outputs, quiet=quiet):
        print(line, file=sys.stderr if failed else sys.stdout, flush=True)
        bad += failed
    for written in filter(None, (options.csv, options.html)):
        print(f"written: {written}", file=sys.stderr)
    return 2 if bad else 0
