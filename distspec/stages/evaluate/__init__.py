"""Known anomalies planted in held-out spectra -> how good each detector and explainer is.

- `stage`: `EvaluateStage`: chooses hosts, hands out work, measures.
- `workers`: what runs in workers: anomalies planted in a few hosts, scored or explained.
- `injection`: the sixteen kinds, and how each changes a spectrum.
- `companions`: templates of what is planted.
- `regions`: the pixels that make a changed spectrum odd.
- `section`: its part of the page: the measurement in words and figures; what evaluation.json holds.
- `section.html.jinja`: the same as HTML.
- `truth.html.jinja`: what a simulated survey planted and what was found of it, as HTML.
"""

__all__: list[str] = []
