"""Store -> settings with which `train` does best.

- `stage`: `TuneStage`: the search by Ray Tune and Optuna, and the settings file.
- `workers`: what runs in workers: one trial.
- `space`: what a trial may try.
- `study`: what is known of a search: Optuna's journal.
"""

__all__: list[str] = []
