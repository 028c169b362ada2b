"""Find anomalous spectra in survey-size data, and say why they are odd."""

__version__ = "0.1.0"
