"""`distspec report`: everything -> one self-contained HTML page, and the ranked table as CSV.

`report.html` shows what was run, every spectrum accounted for, the training, how scores are distributed, how far
detectors agree, the top spectra with their reconstructions, weights and lines, groups that are odd for the same
reason, and what was measured on planted anomalies: whatever of it there is. `anomalies.csv` is the ranked table: ids,
catalogue columns, all scores, and for each spectrum the heaviest region and what the numbers suggest.

    [report]
    score = "density"    # ranks the spectra: -log p. Any score, also a
                         # detector's name, rank_mean or rank_union
    spectra = 12         # shown with figures
    table = 100          # rows of the table

Both files are written anew by every call, in seconds; each appears whole or not at all. The page holds its own code
and loads nothing, so it can be kept and sent as one file. Cells of the CSV that a spreadsheet would take for a
formula are made harmless; text is quoted and numbers are not, and ids are text everywhere: a browser's numbers cannot
hold them.

In the code: `page.py` asks every stage for its sections and puts them into the frame `page.html.jinja`; it knows no
stage. The report's own sections are the cards of the ranked spectra (`cards.py`), the table, and how all of it is
made again. All text that comes from survey files is escaped.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata

from distspec import __version__
from distspec.addresses import Place
from distspec.config import Tracking, dump
from distspec.errors import CheckpointError, ConfigError
from distspec.files import write_file
from distspec.results.layout import report_path, table_path
from distspec.runtime.threads import one_thread
from distspec.stages.report.cards import Ranked, cards_section, rank, ranked_csv, table_section
from distspec.stages.report.page import page
from distspec.stages.stage import Job, Products, Section, Stage, State

__all__ = ["ReportStage", "report"]


class ReportStage(Stage):
    """Everything -> one HTML page and a ranked table."""

    name = "report"
    uses = ("ingest", "train", "score", "detect", "compare", "explain", "cluster", "evaluate")

    def state(self, job: Job) -> State:
        """Look whether there is a page."""
        there = report_path(job.experiment).is_file() and table_path(job.experiment).is_file()
        return State(int(there), 1, "pages", "" if there else "not written", again=True)

    def make(self, job: Job) -> Products:
        """Write the page and the table anew."""
        path = report(job)
        return job.having(report=path, table=table_path(job.experiment))

    def told(self, made: Products) -> Iterator[tuple[str, str]]:
        """Name the table and the page."""
        if made.report is not None:
            yield "table", str(made.table)
            yield "report", str(made.report)

    def sections(self, job: Job) -> Iterator[Section]:
        """Show the cards, the table, and how all of it is made again."""
        return _sections(job, rank(job))


@one_thread()
def report(job: Job) -> Place:
    """Write the report and the ranked table of an experiment; each appears whole or not at all.

    Arguments:
        job: with the products of all stages, and the stages, each of which gives its part of the page.

    Returns:
        Path of the page.

    Raises:
        ConfigError: the score that ranks does not exist.
        CheckpointError: the scores were made by another model.
        ShardError: a spectrum is neither scored nor set aside, or both.
        StoreError: the counts do not add up, or a file cannot be written.
    """
    _require_fit(job)
    ranked = rank(job)
    parts: list[Section] = []
    for stage in job.stages:
        parts += _sections(job, ranked) if stage.name == ReportStage.name else stage.sections(job)
    text = page(job.experiment.name, parts)
    classes = "posterior" in job.scores.fields
    ascents = job.have.ascents is not None
    table = ranked_csv(ranked.rows, job.all_scores.names, ways=ascents, classes=classes)
    write_file(table_path(job.experiment), table)
    write_file(report_path(job.experiment), text)
    return report_path(job.experiment)


def _sections(job: Job, ranked: Ranked) -> Iterator[Section]:
    made = [
        ("Store", job.store.digest),
        ("Recipe", job.store.recipe),
        ("Model", job.checkpoint.sha256[:12]),
        ("Scores", job.scores.name),
        ("Seed", str(job.experiment.seed)),
        ("distspec", __version__),
        *((package, metadata.version(package)) for package in ("torch", "numpy", "ray")),
        ("Written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    yield Section("run", "What was run", "report/facts.html.jinja", {"title": "Provenance", "pairs": made})
    yield cards_section(job, ranked)
    yield table_section(job, ranked)
    # The address of the tracking server may hold a password.
    settings = job.experiment.model_copy(update={"tracking": Tracking(model=job.experiment.tracking.model)})
    shown = {"name": job.experiment.name, "settings": dump(settings)}
    yield Section("settings", "Reproduce", "report/settings.html.jinja", shown)


def _require_fit(job: Job) -> None:
    """Refuse parts that do not belong together."""
    chosen, scores, checkpoint = job.experiment.report.score, job.scores, job.checkpoint
    names = job.all_scores.names
    if chosen not in names:
        raise ConfigError(f"report.score is {chosen!r}; there are {', '.join(names)}: run its stage first")
    checkpoint.require(job.store.grid, job.store.recipe)
    if scores.attributes.get("model") != checkpoint.sha256:
        raise CheckpointError(f"{scores.name} was not made by model {checkpoint.sha256[:12]}; score with this model")
