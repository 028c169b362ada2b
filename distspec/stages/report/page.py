"""How the page is put together: sections of the stages in a frame. Knows no stage."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distspec.results.figures.kit import COLORS, bokeh_script, embed
from distspec.stages.stage import Section

__all__ = ["page", "render_section"]


@dataclass(frozen=True)
class _Part:
    """All sections of one anchor, rendered."""

    anchor: str
    title: str
    body: Markup


def page(name: str, sections: Iterable[Section]) -> str:
    """Render the whole page, which holds its own code and loads nothing.

    Arguments:
        name: of the experiment.
        sections: in their order; those of one anchor stand together, where the first of them is.
    """
    sections = list(sections)
    # Bokeh goes through all figures again for each that it adds, so they are embedded at once.
    script, places = embed({key: figure for section in sections for key, figure in section.figures.items()})
    marked = {key: Markup(place) for key, place in places.items()}
    parts: dict[str, _Part] = {}
    for section in sections:
        body = render_section(section, marked)
        before = parts.get(section.anchor)
        parts[section.anchor] = _Part(section.anchor, section.title, body if before is None else before.body + body)
    frame = _environment().get_template("report/page.html.jinja")
    return frame.render(name=name, parts=list(parts.values()), scripts=Markup(bokeh_script() + script))


def render_section(section: Section, places: Mapping[str, Markup]) -> Markup:
    """Render one section; its template may use nothing but its content, `places` of figures and `colors`."""
    template = _environment().get_template(section.template)
    return Markup(template.render(**section.content, places=places, colors=COLORS))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("distspec", "stages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "count": "{:,}".format, "percent": _percent, "redshift": _redshift}
    environment.filters |= {"probability": _probability, "abs_argmax": lambda weights: int(np.abs(weights).argmax())}
    return environment


def _number(value: float | None, digits: int = 4) -> str:
    """Write a number with some significant digits; a dash where it is unknown."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def _redshift(value: float) -> str:
    return f"{value:.5f}".replace("-", "−") if np.isfinite(value) else "–"


def _percent(share: float) -> str:
    """Write a share as a percentage; small ones keep two significant digits."""
    if not np.isfinite(share):
        return "–"
    digits = ".0f" if share >= 0.1 or share == 0 else ".2g"
    return f"{100 * share:{digits}}\u00a0%"


def _probability(value: float) -> str:
    """Write a probability as a percentage that is never surer than it is."""
    return ">\u00a099\u00a0%" if value >= 0.995 else _percent(value)
