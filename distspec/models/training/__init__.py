"""Fits of networks, by one worker or many. The only part of `models/` that reads a store.

- `feed`: the training spectra of a store, every worker its own share.
- `spectra`: the same as they are read, ahead and side by side, or held in memory.
- `loop`: one loop for every network: steps, epochs, states to go on from.
- `steps`: a step by one worker or many, or by shares whose sums do not depend on the workers.
- `group`: who adds up over workers.
"""
