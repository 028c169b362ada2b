"""What stages left, opened row by row: the read side, which report, portal and notebooks share.

- `layout`: every name on disk, and what decides it.
- `facts`: a folder with one JSON that is written last.
- `scores`: all scores of a store side by side, their distributions, top lists and ranks.
- `explanations`: weights of regions, method by method.
- `ascents`: ways to higher probability.
- `lines`: emission lines and indices, and what they suggest.
- `truth`: what was planted, found and pointed at.
- `columns`: which catalogue columns are properties, exposures, parts of the instrument.
- `figures/`: spectra as Bokeh draws them.
"""
