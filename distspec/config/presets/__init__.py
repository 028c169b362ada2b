"""Recipes of papers and surveys as settings: `distspec run pae ingest.source.kind=sdss ingest.source.path=FOLDER`.

- `cnn_stars.toml`: Sharma et al. (2019): stars, 4000-7195 Å at 5 Å, flux 1 at 5550 Å.
- `comparison.toml`: Reis et al. (2019): galaxies of highest S/N, 3700-8000 Å at 1 Å.
- `demo.toml`: a simulated survey of 20,000 spectra, from nothing to a report in a few minutes.
- `desi.toml`: DESI in the observed frame at full resolution, for models that know the redshift themselves.
- `desi_rest.toml`: DESI in the rest frame, 3500-7000 Å, for models that compare spectra pixel by pixel.
- `pae.toml`: Böhm, Kim & Juneau (2023): 1000 log bins, 3388-8318 Å, distance scaling, over the mean spectrum.
- `vae_lime.toml`: Ortiz & Boquien (2025): 3500-7500 Å, sky patch, gaps filled by medians, top S/N quartile.

Each states in its comments where its paper is silent and what was chosen.
"""

from importlib import resources

__all__ = ["presets"]


def presets() -> dict[str, str]:
    """Give the name and TOML text of each shipped preset."""
    folder = resources.files(__name__)
    return {p.name.removesuffix(".toml"): p.read_text("utf-8") for p in folder.iterdir() if p.name.endswith(".toml")}
