"""Public archives of survey spectra: where their files lie, and how to take them politely and whole.

`transfer` asks over HTTP, `download` brings one file, `manifest` remembers what came, `tables` reads lists of ids;
`sdss`, `desi` and `sparcl` know one archive each. Nothing here knows what a spectrum is.
"""
