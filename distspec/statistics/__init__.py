"""Arrays to numbers, and nothing else: no file, no layer, no spectrum, and nothing of the other rooms.

- `summaries`: moments, medians, histograms, top lists, which merge whatever the cut.
- `holdout`: which rows are kept for validation, drawn by a hash of the row.
- `overlap`: how many anomalies there are, from what lists of them share.
- `significance`: what a list leans towards, and the correction for many tests.
- `ensembles`: detectors joined by ranks, and the survival function that ranks are read from.
- `clustering`: clusters of explanations, and how they compare with other groups.
- `recall`: how good detectors are at planted anomalies, with intervals.
- `plain`: results as plain values for JSON.
"""
