"""Puts the page together and writes it."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from imgcap_jax import __version__
from imgcap_jax.data.sources import parse_mixture
from imgcap_jax.errors import counted
from imgcap_jax.files import write_text
from imgcap_jax.remote import shown
from imgcap_jax.report.html import document, listed, pairs, text
from imgcap_jax.report.run_page.captions import examples, lengths_and_words, truth
from imgcap_jax.report.run_page.objects import found_objects, mistakes
from imgcap_jax.report.run_page.records import Group, Record, groups, read_records
from imgcap_jax.report.run_page.scores import score_tables, sweeps
from imgcap_jax.report.run_page.splits import SplitResult, Splits, has_scores
from imgcap_jax.report.run_page.study import in_order, studies, study_tables
from imgcap_jax.report.run_page.training import learning_curves, rewards, settings
from imgcap_jax.run.folder import Run

_NAMED = 3  # runs, or groups of them, whose names the title has
_COMPARED = 8  # runs whose captions are read, or decoded if there are none: lengths, words and objects are compared


def write_report(
    runs: Sequence[tuple[Run, Path]],
    split: str,
    path: Path,
    images: int,
    say: Callable[[str], None],
    *,
    given: Sequence[Path] = (),
) -> None:
    """Writes a page about runs. The captions of the first run are shown in detail.

    The captions of up to ``_COMPARED`` runs are read, one run of each setting before further seeds. Stored captions are
    reused. If they are missing or out of date, the split is decoded, as by ``imgcap evaluate``. Of the other runs, the
    stored scores are shown.

    Args:
        runs: the runs, each with the folder of its features.
        split: the split whose captions are shown.
        path: the file.
        images: the number of images that are shown.
        say: receives a line for each thing that the page lacks.
        given: for each run, the folder that the user gave: the run, or a folder that contains it, such as a study.

    Raises:
        UserError: a dataset has no such split, a file of a run is damaged, or the page cannot be written.
    """
    folders = [run.folder for run, _ in runs]
    tables, missing = study_tables(dict(zip(folders, given or folders, strict=True)))
    order = in_order(folders, tables)
    runs, folders = [runs[position] for position in order], [folders[position] for position in order]
    settings_of = [next(filter(None, (one.setting_of(folder) for one in tables)), "") for folder in folders]
    records = read_records(runs, settings_of)
    found = groups(records)
    results, notes = _results(found, split)
    missing += notes
    parts = [studies(tables), learning_curves(found), rewards(found), score_tables(found, results, split)]
    detailed = next((record for record in records if record.name in results), None)
    if detailed is not None:
        sections, notes = _captions(detailed, results, images)
        parts += sections
        missing += notes
    parts += [sweeps(found), settings(found)]
    missing += [
        f"{record.name}: no metrics of training" for record in records if not (record.train or record.validation)
    ]
    missing = list(dict.fromkeys(missing))
    for line in missing:
        say(line)
    studied = [one.folder.absolute().name for one in tables] if all(record.setting for record in records) else []
    titles = studied or [group.name for group in found]
    title = f"Report: {', '.join(titles) if len(titles) <= _NAMED else f'{len(records)} runs'}"
    body = (
        _navigation([part for part in parts if part])
        + f'<main id="top">\n<h1>{text(title)}</h1>\n'
        + pairs("facts", _facts(found, results, detailed, split))
        + ("" if detailed is None else pairs("tiles", _tiles(results[detailed.name])))
        + listed("legend", missing, "Missing on this page")
        + "".join(parts)
        + f"</main>\n<footer>imgcap_jax {__version__}, {datetime.date.today().isoformat()}</footer>\n"
    )
    write_text(path, document(title, body))


def _results(found: Sequence[Group], split: str) -> tuple[dict[str, SplitResult], list[str]]:
    """The captions of the first runs that have some, and a line for each thing that is missing."""
    # Other settings come before other seeds of the same ones.
    ranks = [(place, record) for group in found for place, record in enumerate(group.records)]
    results: dict[str, SplitResult] = {}
    missing: list[str] = []
    results_of = Splits(split)
    for _, record in sorted(ranks, key=lambda one: one[0]):
        if len(results) == _COMPARED:
            if not has_scores(record.run.folder, split):
                missing.append(f"{record.name}: no scores of split {split}; evaluate the run")
            continue
        result, notes = results_of(record)
        missing += notes
        if result is not None:
            results[record.name] = result
    return results, missing


def _captions(detailed: Record, results: Mapping[str, SplitResult], images: int) -> tuple[list[str], list[str]]:
    result = results[detailed.name]
    # Captions of other images or with other references cannot be compared.
    alike = {name: other for name, other in results.items() if other.references == result.references}
    others = {name: other for name, other in alike.items() if name != detailed.name}
    compared = {detailed.name: result, **dict(list(others.items())[: _COMPARED - 1])}
    objects = found_objects(detailed, result)
    shots, notes = examples(detailed, result, others, images, objects)
    wrong = truth(detailed.name, result.truth) if result.truth is not None else ""
    if objects is not None:
        of_others = {name: found_objects(detailed, other) for name, other in compared.items() if other is not result}
        kept = {name: one for name, one in of_others.items() if one is not None}
        wrong = mistakes({detailed.name: objects, **kept})
    return [shots, wrong, lengths_and_words(detailed, compared)], notes


def _facts(
    found: Sequence[Group], results: Mapping[str, SplitResult], detailed: Record | None, split: str
) -> list[tuple[str, str]]:
    records = [record for group in found for record in group.records]
    facts = [("Run" if len(records) == 1 else "Runs", ", ".join(shown(record.run.folder) for record in records[:6]))]
    if len(records) > 6:
        facts[0] = (facts[0][0], f"{facts[0][1]} and {len(records) - 6} more")
    first = records[0].experiment
    model = f"{type(first.encoder).__name__} and {type(first.decoder).__name__}, {first.objective.title}"
    facts.append(("Model", model if len(found) == 1 else f"{model} (the first run)"))
    if detailed is not None:
        result = results[detailed.name]
        where = "" if len(records) == 1 else f"{detailed.name}; "
        images = counted(len(result.captions), "image")
        dataset = parse_mixture(detailed.experiment.data.dataset)[0][0]
        facts.append(("Captions", f"{where}{dataset} {split}, {images}, parameters of step {result.step:,}"))
        facts.append(("Decoding", result.decoding))
    return facts


def _tiles(result: SplitResult) -> list[tuple[str, str]]:
    tiles = [(name, f"{100 * value:.1f}") for name, value in result.scores.items()]
    return tiles + ([] if result.truth is None else [("true", f"{100 * result.truth.true:.1f} %")])


def _navigation(parts: Sequence[str]) -> str:
    """Links to the sections, from their headings."""
    links = []
    for part in parts:
        name = part.partition('id="')[2].partition('"')[0]
        title = part.partition("<h2")[2].partition(">")[2].partition("</h2>")[0]
        links.append(f'<li><a href="#{name}">{title}</a></li>')
    return (
        '<a class="skip" href="#top">Skip to the content</a>\n'
        f'<nav aria-label="sections"><ul>{"".join(links)}</ul></nav>\n'
    )
