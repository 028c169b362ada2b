"""A simulated survey with truth, for demonstrations, tests and benchmarks.

- `survey`: the source: seeded galaxies, quasars and stars, some with a planted anomaly.
- `populations`: what a row is before it is observed.
- `templates`: spectra at rest.
- `instrument`: objects -> observed spectra with noise.
- `anomalies`: what is planted, and at which wavelengths it shows.
"""
