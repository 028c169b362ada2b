"""What columns mean: one table of units, IVOA content descriptors and descriptions, for every output.

References:
    VOUnits, https://www.ivoa.net/documents/VOUnits/; UCD1+, https://www.ivoa.net/documents/UCD1+/
"""

from dataclasses import asdict, dataclass

__all__ = ["COLUMN_INFO", "FLUX_UNIT", "ColumnInfo"]


@dataclass(frozen=True)
class ColumnInfo:
    """What one column means.

    Arguments:
        unit: as astropy and the VO read it; empty for a number without one, and where none is known.
        ucd: IVOA content descriptor.
        description: one line for people.
    """

    unit: str = ""
    ucd: str = ""
    description: str = ""

    def to_dict(self) -> dict[str, str]:
        """Give what is known, by name."""
        return {key: value for key, value in asdict(self).items() if value}


FLUX_UNIT = "1e-17 erg.s**-1.cm**-2.Angstrom**-1"

COLUMN_INFO: dict[str, ColumnInfo] = {
    "row": ColumnInfo("", "meta.record", "Position in the store"),
    "id": ColumnInfo("", "meta.id;meta.main", "Identifier of the survey"),
    "ra": ColumnInfo("deg", "pos.eq.ra;meta.main", "Right ascension, ICRS"),
    "dec": ColumnInfo("deg", "pos.eq.dec;meta.main", "Declination, ICRS"),
    "z": ColumnInfo("", "src.redshift", "Redshift by the survey's pipeline"),
    "zwarn": ColumnInfo("", "meta.code.qual", "Warning bits of the survey's redshift pipeline; 0 is good"),
    "class": ColumnInfo("", "src.class", "Class by the survey's pipeline"),
    "subclass": ColumnInfo("", "src.class", "Subclass by the survey's pipeline"),
    "ebv": ColumnInfo("mag", "phot.color.excess", "Galactic E(B-V) that the survey gives"),
    "status": ColumnInfo("", "meta.code.status", "Why the spectrum is set aside, as bits; 0 for one that is used"),
    "reasons": ColumnInfo("", "meta.note", "Why the spectrum is set aside, in words"),
    "file": ColumnInfo("", "meta.id;meta.file", "File of the survey"),
    "note": ColumnInfo("", "meta.note", "What is to be said of this row, such as why it could not be read"),
    "snr": ColumnInfo("", "stat.snr", "Median over the good pixels of flux / sigma"),
    "total_snr": ColumnInfo("", "stat.snr", "Root of the sum over the good pixels of (flux / sigma)^2"),
    "coverage": ColumnInfo("", "", "Share of the grid's pixels that are good"),
    "span": ColumnInfo("", "", "Share of the grid between its first and its last good pixel"),
    "norm": ColumnInfo(FLUX_UNIT, "arith.factor", "Prepared flux times this is the flux in the survey's unit"),
    "plate": ColumnInfo("", "meta.id", "Plate"),
    "mjd": ColumnInfo("d", "time.epoch", "Modified Julian date of the observation"),
    "lmjd": ColumnInfo("d", "time.epoch", "Local modified Julian date of the observation"),
    "fiber": ColumnInfo("", "meta.id", "Fiber"),
    "truth_z": ColumnInfo("", "src.redshift", "True redshift of the simulation"),
    "anomaly": ColumnInfo("", "meta.code", "Planted anomaly of the simulation; empty for none"),
    "anomaly_wave": ColumnInfo("Angstrom", "em.wl", "Windows of the planted anomaly, vacuum, rest frame"),
    "latents": ColumnInfo("", "", "Latent variables of the model"),
    "mse": ColumnInfo("", "stat.fit.residual", "Mean squared residual of the reconstruction"),
    "mse_filtered": ColumnInfo("", "stat.fit.residual", "As mse, without windows around emission lines"),
    "mse_trimmed": ColumnInfo("", "stat.fit.residual", "As mse, without the largest residuals"),
    "mse_filtered_trimmed": ColumnInfo("", "stat.fit.residual", "As mse_filtered, without the largest residuals"),
    "relative": ColumnInfo("", "stat.fit.residual", "Mean squared residual, weighted by the inverse flux"),
    "relative_filtered": ColumnInfo("", "stat.fit.residual", "As relative, without windows around emission lines"),
    "relative_trimmed": ColumnInfo("", "stat.fit.residual", "As relative, without the largest residuals"),
    "relative_filtered_trimmed": ColumnInfo("", "stat.fit.residual", "As relative_filtered, without the largest"),
    "rmse": ColumnInfo("", "stat.fit.residual", "Root of the mean squared residual over good pixels, unit of the flux"),
    "difference": ColumnInfo("", "stat.fit.residual", "Mean over good pixels of observed minus reconstructed flux"),
    "chi2": ColumnInfo("", "stat.fit.chi2", "Mean over the good pixels of (residual / sigma)^2"),
    "matched": ColumnInfo("", "meta.code", "Whether the value-added table holds this object"),
    "spectrum": ColumnInfo("", "spect", "Prepared flux, inverse variance (0: masked), wavelengths (vacuum Angstrom)"),
    "_healpix_29": ColumnInfo("", "pos.healpix", "HEALPix pixel of order 29, nested"),
}
