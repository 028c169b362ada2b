"""The command line: one command per verb. Parse, call, print; no logic."""

import ast
import inspect
import os
import re
import shlex
import shutil
import sys
import textwrap
import warnings
from importlib import resources
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


@app.command(sort_key=0)
def demo(*overrides: Overrides) -> None:
    """Simulate a survey, find its planted anomalies and explain them, in ./distspec-demo.

    It is `distspec run` on the preset `demo`: 20,000 spectra, a few minutes on two cores. It ends by naming the report
    and the command that opens the tracked runs.
    """
    _run("demo", overrides)


@app.command(sort_key=1)
def run(file: File, /, *overrides: Overrides) -> None:
    """Go the whole way, from ingest to report. What is done already is not done again.

    The stages are ingest, train, score, detect, compare, explain, cluster, evaluate and report; each is a verb of its
    own, whose --help tells what it does. A run that was interrupted, or killed, goes on where it stopped and ends with
    the same bytes. Settings on the command line win over the file:

        distspec run sdss.toml train.epochs=80 explain.scores='["mse", "chi2"]'

    Input that cannot be used gets one line and exit status 2. A run that was interrupted ends with 130, by SIGTERM with
    143. Spectra that ended their workers again and again are set aside, and the run goes on and ends with 3. One run at
    a time works in an output.
    """
    _run(file, overrides)


@app.command(sort_key=2)
def plan(file: File, /, *overrides: Overrides) -> None:
    """Say how far each stage is and what is left to do; starts nothing, writes nothing.

    A line a stage: `done`; `begun` or `pending` with how much of it is done and why it is not; `waits` for a stage that
    is not done, since the names of what it makes depend on that; or `off`, and which setting leaves it out. It may be
    asked while a run is at work.
    """
    from distspec.config import load

    experiment = load(file, overrides)
    from distspec.pipeline import plan

    for one in plan(experiment):
        print(f"{one.stage:<9} {_as_text(one)}{'' if one.in_run else f' (by name: distspec {one.stage})'}")


@app.command(sort_key=3)
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
        reason = f"{made.folder}/failed.csv says why; repeat the command to try again"
        print(f"distspec: {missing} {made.unit} did not come; {reason}", file=sys.stderr)
        sys.exit(3)


@app.command(sort_key=4)
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


@app.command(sort_key=5)
def tune(file: File, /, *overrides: Overrides) -> None:
    """Store -> settings file with which `train` does best, by many short trainings."""
    _run(file, overrides, "tune")


@app.command(sort_key=6)
def train(file: File, /, *overrides: Overrides) -> None:
    """Store -> trained model."""
    made = _run(file, overrides, "train")
    if "accuracy" in made.checkpoint.facts:
        from distspec.stages.train.accuracy import as_text

        print(as_text(made.checkpoint.facts["accuracy"]))


@app.command(sort_key=7)
def score(file: File, /, *overrides: Overrides) -> None:
    """Store and model -> latents and scores of every spectrum."""
    _run(file, overrides, "score")


@app.command(sort_key=8)
def detect(file: File, /, *overrides: Overrides) -> None:
    """Store -> classical detectors fitted (PCA, forests, Fisher vectors), and their scores of every spectrum."""
    _run(file, overrides, "detect")


@app.command(sort_key=9)
def compare(file: File, /, *overrides: Overrides) -> None:
    """Scores -> how far detectors agree, how many anomalies that implies, and what each leans towards."""
    _run(file, overrides, "compare")


@app.command(sort_key=10)
def explain(file: File, /, *overrides: Overrides) -> None:
    """Top-ranked spectra -> the wavelengths that make them odd."""
    _run(file, overrides, "explain")


@app.command(sort_key=11)
def cluster(file: File, /, *overrides: Overrides) -> None:
    """Explanations -> groups of spectra that are odd for the same reason, with stacks, weights and lines of each."""
    _run(file, overrides, "cluster")


@app.command(sort_key=12)
def evaluate(file: File, /, *overrides: Overrides) -> None:
    """Known anomalies planted in your own spectra -> what each detector finds, and where explanations point."""
    _run(file, overrides, "evaluate")


@app.command(sort_key=13)
def report(file: File, /, *overrides: Overrides) -> None:
    """Everything -> one HTML page and a ranked table."""
    _run(file, overrides, "report")


@app.command(sort_key=14)
def export(file: File, /, *overrides: Overrides) -> None:
    """Catalogue, scores and value-added columns -> Parquet, VOTable or HATS for other programs."""
    _run(file, overrides, "export")


@app.command(sort_key=15)
def config(file: File | None = None, /, *overrides: Overrides, explain: Meanings = False) -> None:
    """Print the resolved settings, defaults included, as TOML; with --explain, what they mean and may be."""
    if explain:
        from distspec.config.reference import describe

        print(describe([*filter(None, [file]), *overrides], shutil.get_terminal_size().columns))
        return
    from distspec.config import dump, load

    print(dump(load(file, overrides)), end="")


@app.command(sort_key=16)
def ui(file: File, /, *overrides: Overrides, port: Port = 5000) -> None:
    """Open the pages of the tracked runs on this machine (Ctrl-C ends it).

    Runs and models go to a SQLite file in the output folder, or to the server that `tracking.uri` or
    MLFLOW_TRACKING_URI names, which has pages of its own.
    """
    from distspec.config import load
    from distspec.runtime.tracking import serve

    sys.exit(serve(load(file, overrides), port))


def _run(file: str, overrides: tuple[str, ...], only: str | None = None) -> Any:
    """Run all stages or one, name what there is, and give it."""
    # Imported here, so that --help answers at once.
    from distspec.config import load

    experiment = load(file, overrides)
    from distspec.pipeline import given_up, run, told

    made = run(experiment, only, say=print)
    for label, text in told(made):
        print(f"{label:<8} {text}")
    print(f"runs     {shlex.join(['distspec', 'ui', file, *overrides])}")
    lost = given_up(made)
    for what, rows in lost.items():
        row, why = next(iter(rows.items()))
        print(f"distspec: {what}: {len(rows)}, the first: row {row} ({why})", file=sys.stderr)
    if lost:
        sys.exit(3)
    return made


def _as_text(planned: Any) -> str:
    """Say how far a stage is, in a line."""
    if planned.off:
        return f"off      {planned.off}"
    if planned.after:
        return f"waits    after {planned.after}"
    state = planned.state
    word = "done" if state.finished else "begun" if state.done else "pending"
    why = f": {state.why}" if state.why else ""
    return f"{word:<8} {state.done} of {state.total} {state.unit}{why}"


def main() -> None:
    """Run the command line: a refused input is one line on stderr and exit status 2."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        _add_details(sys.argv[1:])
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


def _add_details(words: list[str]) -> None:
    """Let `distspec VERB --help` print what the stage says of itself: the docstring of its module."""
    if len(words) < 2 or not {"--help", "-h"} & set(words[1:]) or words[0] not in app:
        return
    verb = app[words[0]]
    text = inspect.getdoc(verb.default_command) or ""
    folder = resources.files("distspec") / "stages"
    for place in (folder / words[0] / "stage.py", folder / f"{words[0]}.py"):
        if place.is_file():
            # Read and not imported: the stage's libraries take seconds.
            text = ast.get_docstring(ast.parse(place.read_text("utf-8"))) or ""
            text += f"\n\nWhat each of its settings means: distspec config --explain {words[0]}"
    verb.help = "\n\n".join(_wrapped(part) for part in text.split("\n\n"))


def _wrapped(paragraph: str) -> str:
    """Wrap running text and lists for the terminal; leave what is set in, examples and tables, as it is."""
    if paragraph.startswith(" "):
        return paragraph
    # Longer lines are hard to read, however wide the terminal is.
    width = min(shutil.get_terminal_size().columns, 100)
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()), width, subsequent_indent="  " * item.startswith("- "), break_on_hyphens=False
        )
        for item in re.split(r"\n(?=- )", paragraph)
    )


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Show our own warnings in one line; those of libraries speak to their developers."""
    if issubclass(category, DistspecWarning):
        print(f"distspec: {message}", file=sys.stderr)


def _fail(message: str) -> None:
    print(f"distspec: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
