"""Top rows -> weights of wavelengths, lines, ascents to higher probability.

- `stage`: `ExplainStage`: a layer for each method, and those of lines and ascents.
- `workers`: what runs in workers: a few spectra explained, followed up the density, or their lines measured.
- `selection`: which spectra are explained.
- `section`: the words and the figure of lines and their ratios.
- `section.html.jinja`: its part of the page: lines of what is explained.
"""

__all__: list[str] = []
