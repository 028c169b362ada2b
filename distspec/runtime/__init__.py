"""Machines, whatever the stage: Ray and MLflow.

- `workers`: Ray: joined or started; work over shards in workers, and what happens when one dies.
- `actors`: what surrounds work in a worker: one thread, the driver's folder, failures as values.
- `threads`: every pool of threads held to one, around all work whose bits are promised.
- `tracking`: MLflow: runs and models; the only file that knows it.
- `progress`: a bar with a rate, on a terminal.
"""

__all__: list[str] = []
