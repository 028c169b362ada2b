"""Fits of networks, by one worker or many. The only part of `models/` that reads a store.

- `feed`: the training spectra of a store, every worker its own share.
- `loop`: one loop for every network: steps, epochs, states to go on from.
- `group`: who adds up over workers.
"""
