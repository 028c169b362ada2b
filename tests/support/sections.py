"""A section of the page rendered alone."""

from markupsafe import Markup

from distspec.results.figures.kit import embed
from distspec.stages.report.page import render_section
from distspec.stages.stage import Section


class _Places(dict[str, Markup]):
    """Places of figures; keeps which were asked for."""

    def __init__(self, places: dict[str, str]) -> None:
        super().__init__({name: Markup(place) for name, place in places.items()})
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Markup:
        self.asked.add(name)
        return super().__getitem__(name)


def rendered(section: Section) -> str:
    """Render a section as the page does; a figure that is drawn and not asked for, or the reverse, is an error."""
    script, places = embed(section.figures)
    assert script or not section.figures
    shown = _Places(places)
    text = render_section(section, shown)
    assert shown.asked == set(section.figures)
    return text
