"""The verbs, a folder each: what it makes, its workers, its part of the page. Stages never import each other.

- `order`: the one list of stages, in their order; a new stage is a line here.
- `stage`: what every stage is: `Stage`, `Job`, `Products`, `State`, `Section`.
- `fetch`: archive -> survey files.
- `ingest/`: survey files -> store.
- `tune/`: store -> settings with which `train` does best.
- `train/`: store -> model.
- `score/`: store, model -> scores.
- `detect/`: store -> classical detectors and their scores.
- `compare/`: scores -> overlaps, number of anomalies, leanings, ensembles.
- `explain/`: top rows -> weights of wavelengths, lines, ascents to higher probability.
- `cluster/`: explanations -> groups that are odd for the same reason.
- `evaluate/`: known anomalies planted -> recall of each detector, aim of each explainer.
- `report/`: everything -> the page and the ranked table.
- `export/`: store -> Parquet, VOTable or HATS.
"""

__all__: list[str] = []
