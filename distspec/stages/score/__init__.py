"""Store, model -> latents and scores of every spectrum.

- `stage`: `ScoreStage`: one pass over the shards, and a summary.
- `workers`: what runs in workers: a shard scored and summarized.
- `census`: scored + set aside = all.
- `section`: its part of the page: the counts, and how scores are distributed.
- `section.html.jinja`: the same as HTML: the distributions.
- `counts.html.jinja`: the same as HTML: every spectrum accounted for.
"""

__all__: list[str] = []
