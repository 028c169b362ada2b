"""Survey files -> store.

- `stage`: `IngestStage`: lists files, hands out shards, finishes or extends the store.
- `workers`: what runs in workers: counts files; reads, prepares and writes a shard; takes the second look.
- `row_plan`: which file gives which rows.
- `values`: value-added tables joined by id.
- `sample`: statistics of the whole sample, computed once.
- `finish`: what only all rows can tell: ids that come twice, the statistics.
- `ledger`: everything that is set aside, as a file.
- `check`: `--check` and `--mend`: is a store what was written into it?.
- `section`: its part of the page: what was read, and how it was prepared, in words.
"""

__all__: list[str] = []
