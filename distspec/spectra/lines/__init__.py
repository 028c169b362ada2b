"""Spectral lines: where they are, how they are measured, and what they tell of a spectrum.

- `wavelengths`: emission and absorption lines by name, vacuum.
- `tables`: what is kept of each spectrum's lines: fluxes, widths, indices, ratios.
- `fits`: lines of a spectrum, fitted together.
- `ratios`: the diagram that parts star formation from active nuclei, and reddening by dust.
- `diagnosis`: what an explanation points at and what the lines suggest, in words.
- `changes`: what grows and fades between two spectra, with the names of lines.
"""
