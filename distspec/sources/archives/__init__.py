"""Public archives of survey spectra: where their files lie, and how to take them politely and whole.

Nothing here knows what a spectrum is. By the first word
of `distspec fetch`:

======  =============================================================  ================================================
sdss    Science Archive Server: `spec` files; SkyServer's SQL          a table of plate, mjd, fiberid; or SQL
desi    public releases: coadds and redshifts by healpix or tile       a table of survey, program, healpix; of tileid,
                                                                       night, petal; of targetid with a catalogue
sparcl  NOIRLab's service: spectra of SDSS and DESI as Parquet tables  a table of sparcl_id, specid or targetid; or
                                                                       constraints
======  =============================================================  ================================================

- `sdss`: SDSS's tree and SQL.
- `desi`: DESI's tree.
- `sparcl`: SPARCL's requests and answers.
- `ids`: tables of what is wanted.
- `transfer`: HTTP with manners.
- `download`: one file, resumed, verified, whole.
- `manifest`: what came, and what did not.
"""
