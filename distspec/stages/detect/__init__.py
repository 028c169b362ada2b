"""Store -> classical detectors fitted, and a layer of scores for each.

- `stage`: `DetectStage`: growth on the sample, looks over the survey, scores.
- `workers`: what runs in workers: a part of a detector grown; a shard looked at; a shard scored.
"""

__all__: list[str] = []
