"""The command line: one command per verb. Parse, call, print; no logic."""

import os
import shlex
import shutil
import sys
import warnings
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter

from distspec import __version__
from distspec.errors import DistspecError, DistspecWarning

__all__ = ["app", "main"]

app = App(
    name="distspec",
    help="Find anomalous spectra in survey-size data, and say why they are odd.",
    version=f"distspec {__version__}",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)

File = Annotated[str, Parameter(help="settings file (TOML), or the name of a preset")]
Overrides = Annotated[str, Parameter(help="settings that differ, as TOML: train.epochs=40", allow_leading_hyphen=False)]
Check = Annotated[bool, Parameter(help="verify the store that is there: read all of it", negative="")]
Mend = Annotated[bool, Parameter(help="as --check, and take out what is damaged, to be made again", negative="")]
Archive = Annotated[Literal["sdss", "desi", "sparcl"], Parameter(help="where from")]
Wishes = Annotated[str, Parameter(help="settings, as TOML: to=FOLDER ids=list.csv", allow_leading_hyphen=False)]
Meanings = Annotated[bool, Parameter(help="what settings mean: of all, or of sections (train.model)", negative="")]
Port = Annotated[int, Parameter(help="port on the loopback interface")]


@app.command
def demo(*overrides: Overrides) -> None:
    """Simulate a survey, find its planted anomalies and explain them, in ./distspec-demo."""
    _run("demo", overrides)


@app.command
def run(file: File, /, *overrides: Overrides) -> None:
    """Go the whole way, from ingest to report. What is done already is not done again."""
    _run(file, overrides)


@app.command
def ingest(file: File, /, *overrides: Overrides, check: Check = False, mend: Mend = False) -> None:
    """Survey files -> store. Files that are new since the last time extend it."""
    if not (check or mend):
        _run(file, overrides, "ingest")
        return
    from distspec.config import load
    from distspec.pipeline import check as verify

    experiment = load(file, overrides)
    problems = verify(experiment, mend=mend)
    for problem in problems:
        print(f"distspec: {' '.join(problem.split())}", file=sys.stderr)
    if problems:
        sys.exit(2)
    print("store    whole: every chunk was read and is as it was written; all ids are unique")


@app.command
def train(file: File, /, *overrides: Overrides) -> None:
    """Store -> trained model."""
    _run(file, overrides, "train")


@app.command
def tune(file: File, /, *overrides: Overrides) -> None:
    """Store -> settings file with which `train` does best, by many short trainings."""
    _run(file, overrides, "tune")


@app.command
def score(file: File, /, *overrides: Overrides) -> None:
    """Store and model -> latents and scores of every spectrum."""
    _run(file, overrides, "score")


@app.command
def detect(file: File, /, *overrides: Overrides) -> None:
    """Store -> classical detectors fitted (PCA, forests, Fisher vectors), and their scores of every spectrum."""
    _run(file, overrides, "detect")


@app.command
def compare(file: File, /, *overrides: Overrides) -> None:
    """Scores -> how far detectors agree, how many anomalies that implies, and what each leans towards."""
    _run(file, overrides, "compare")


@app.command
def explain(file: File, /, *overrides: Overrides) -> None:
    """Top-ranked spectra -> the wavelengths that make them odd."""
    _run(file, overrides, "explain")


@app.command
def cluster(file: File, /, *overrides: Overrides) -> None:
    """Explanations -> groups of spectra that are odd for the same reason, with stacks, weights and lines of each."""
    _run(file, overrides, "cluster")


@app.command
def evaluate(file: File, /, *overrides: Overrides) -> None:
    """Known anomalies planted in your own spectra -> what each detector finds, and where explanations point."""
    _run(file, overrides, "evaluate")


@app.command
def report(file: File, /, *overrides: Overrides) -> None:
    """Everything -> one HTML page and a ranked table."""
    _run(file, overrides, "report")


@app.command
def export(file: File, /, *overrides: Overrides) -> None:
    """Catalogue, scores and value-added columns -> Parquet, VOTable or HATS for other programs."""
    _run(file, overrides, "export")


@app.command
def fetch(archive: Archive, /, *wishes: Wishes) -> None:
    """Public archive -> survey files in a folder, verified; exit status 3 where some did not come."""
    from distspec.config import load_fetch

    settings = load_fetch(archive, wishes)
    from distspec.stages.fetch import fetch

    made = fetch(settings)
    missing = len(made.failed)
    print(f"{made.unit:<8} {made.folder}: {made.fetched} fetched, {made.there} there already, {missing} failed")
    print(f"next     ingest.source.kind={made.source} {shlex.join([f'ingest.source.path={made.folder}'])}")
    if missing:
        told = f"{made.folder}/failed.csv says why; repeat the command to try again"
        print(f"distspec: {missing} {made.unit} did not come; {told}", file=sys.stderr)
        sys.exit(3)


@app.command
def config(file: File | None = None, /, *overrides: Overrides, explain: Meanings = False) -> None:
    """Print the resolved settings, defaults included, as TOML; with --explain, what they mean and may be."""
    if explain:
        from distspec.config.reference import describe

        print(describe([*filter(None, [file]), *overrides], shutil.get_terminal_size().columns))
        return
    from distspec.config import dump, load

    print(dump(load(file, overrides)), end="")


@app.command
def ui(file: File, /, *overrides: Overrides, port: Port = 5000) -> None:
    """Open the pages of the tracked runs on this machine (Ctrl-C ends it)."""
    from distspec.config import load
    from distspec.tracking import serve

    sys.exit(serve(load(file, overrides), port))


def _run(file: str, overrides: tuple[str, ...], only: str | None = None) -> None:
    """Run all stages or one, and name what was made."""
    # Imported here, so that --help answers at once.
    from distspec.config import load

    experiment = load(file, overrides)
    from distspec.layout import table_path
    from distspec.pipeline import run
    from distspec.spectra import first_reasons

    made = run(experiment, only)
    reasons = first_reasons(made.store.column("status"))
    aside = sum(reasons.values())
    print(f"store    {made.store.path}: {made.store.rows} spectra, {aside} set aside")
    for reason, count in reasons.items():
        print(f"         {count} {reason.lower().replace('_', ' ')}")
    if made.checkpoint is not None:
        print(f"model    {made.checkpoint.folder}")
    if made.scores is not None:
        print(f"scores   {made.store.path}/layers/{made.scores.name}")
    for layer in made.detected.values():
        print(f"scores   {made.store.path}/layers/{layer.name}")
    if made.compared is not None:
        print(f"compared {made.compared.folder}")
    for layer in made.explanations.values():
        print(f"reasons  {made.store.path}/layers/{layer.name}")
    if made.lines is not None:
        print(f"lines    {made.store.path}/layers/{made.lines.name}")
    if made.clustered is not None:
        print(f"clusters {made.clustered.folder}")
    if made.ascents is not None:
        print(f"ways     {made.store.path}/layers/{made.ascents.name}")
    if made.evaluated is not None:
        print(f"measured {made.evaluated.folder}")
    if made.report is not None:
        print(f"table    {table_path(experiment)}")
        print(f"report   {made.report}")
    if made.tuned is not None:
        best, failed = made.tuned, f", {made.tuned.failed} failed" if made.tuned.failed else ""
        print(f"tuned    {best.path}: validation loss {best.loss:.6g}, trial {best.trial}")
        print(f"trials   {best.trials} in {best.table}{failed}")
    if made.exported is not None:
        print(f"export   {made.exported.path}: {made.exported.rows} rows of {len(made.exported.columns)} columns")
    print(f"runs     {shlex.join(['distspec', 'ui', file, *overrides])}")
    if only == "train" and made.checkpoint is not None and "accuracy" in made.checkpoint.facts:
        from distspec.accuracy import as_text

        print(as_text(made.checkpoint.facts["accuracy"]))


def main() -> None:
    """Run the command line: a refused input is one line on stderr and exit status 2."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app(sys.argv[1:], print_error=False, exit_on_error=False)
    except DistspecError as error:
        _fail(str(error))
    except cyclopts.CycloptsError as error:
        _fail(f"{' '.join(str(error).split())}; see distspec --help")
    except KeyboardInterrupt as interrupt:
        print("distspec: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(143 if interrupt.args else 130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Show our own warnings in one line; those of libraries speak to their developers."""
    if issubclass(category, DistspecWarning):
        print(f"distspec: {message}", file=sys.stderr)


def _fail(message: str) -> None:
    print(f"distspec: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
