"""Observed spectra -> comparable spectra.

- `recipe`: sky, pixel noise, dust, rest frame, rebinning, scale, noise floor, cuts.
- `rebin`: from one grid to another: three ways, each with its errors.
"""
