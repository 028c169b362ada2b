"""Machines, whatever the stage: Ray and MLflow.

- `cluster`: Ray, joined or started; what it has, and what is refused since it never will.
- `workers`: work over shards and other items, and what happens when a worker dies, a node is lost, an item kills.
- `passes`: sums over the shards of a survey, added up in workers; or results in the order of the shards.
- `pool`: workers as processes: started, asked, ended, kept for the next stage.
- `lease`: a lock that holds in a bucket.
- `datasets`: a store as a Ray Data dataset, and results per row back into it.
- `actors`: what surrounds work in a worker: one thread, the driver's variables, failures as values.
- `threads`: every pool of threads held to one, around all work whose bits are promised.
- `tracking`: MLflow: runs and models; the only file that knows it.
- `progress`: a bar with a rate, on a terminal.
"""

__all__: list[str] = []
