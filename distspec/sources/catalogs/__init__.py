"""Selection from catalogues larger than memory.

- `catalog`: the wanted spectra of a catalogue, and what it says of them.
- `rows`: its rows, chunk by chunk: FITS tables or separated text.
- `selection`: which rows meet a condition.
"""
