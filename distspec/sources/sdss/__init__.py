"""Spectra of SDSS, BOSS and eBOSS.

- `spec`: `spec` files, one spectrum a file.
- `plates`: `spPlate` with `spZbest`, a plate a file.
- `conventions`: what both share: one grid, one rule for bad pixels, one identifier.
"""
