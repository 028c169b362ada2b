"""Scores -> how far detectors agree, what they lean towards, and ensembles of them.

- `stage`: `CompareStage`: lists, overlaps, tables.
- `workers`: what runs in workers: ensembles of a shard.
- `bias`: what lists lean towards, and exposures that they share.
- `errors`: errors of all scored spectra, as a table.
- `section`: its part of the page: the comparison in words and figures.
- `section.html.jinja`: the same as HTML.
"""

__all__: list[str] = []
