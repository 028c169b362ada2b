"""Settings of `report`: how much is shown, ranked by which score."""

from distspec.config.base import Count, ScoreName, Settings

__all__ = ["Report"]


class Report(Settings):
    """Everything -> one HTML page."""

    score: ScoreName = "mse"
    """The score that ranks the spectra shown."""
    spectra: Count = 12
    """Top spectra shown with figures."""
    table: Count = 100
    """Rows of the ranked table."""
