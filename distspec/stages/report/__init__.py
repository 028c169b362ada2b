"""Everything -> one HTML page and a ranked table.

- `stage`: `ReportStage`: asks all stages for their sections, writes page and table.
- `page`: sections -> the page; knows no stage.
- `page.html.jinja`: the frame of the page, with its style.
- `macros.html.jinja`: what several sections write with.
- `cards`: the ranked spectra: what is told of each.
- `cards.html.jinja`: the same as HTML: cards of the first ones.
- `table.html.jinja`: the same as HTML: the ranked table.
- `facts.html.jinja`: a list of facts as HTML: what was run.
- `settings.html.jinja`: how to make all of it again, as HTML.
"""

__all__: list[str] = []
