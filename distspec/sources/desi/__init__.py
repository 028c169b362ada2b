"""Spectra of DESI.

- `coadds`: `coadd` and `spectra` files as a source.
- `arms`: their pixels: exposures summed, three arms joined.
- `redshifts`: from the redrock file beside a coadd, or from a catalogue.
- `targets`: bit masks: what a fiber was pointed at, and what is wrong with it.
"""
