"""What the columns of a store mean: one table of units, IVOA content descriptors and descriptions, for every output.

References:
    VOUnits, https://www.ivoa.net/documents/VOUnits/; UCD1+, https://www.ivoa.net/documents/UCD1+/
"""

from dataclasses import asdict, dataclass

__all__ = ["MEANINGS", "Meaning"]


@dataclass(frozen=True)
class Meaning:
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

MEANINGS: dict[str, Meaning] = {
    "row": Meaning("", "meta.record", "Position in the store"),
    "id": Meaning("", "meta.id;meta.main", "Identifier of the survey"),
    "ra": Meaning("deg", "pos.eq.ra;meta.main", "Right ascension, ICRS"),
    "dec": Meaning("deg", "pos.eq.dec;meta.main", "Declination, ICRS"),
    "z": Meaning("", "src.redshift", "Redshift by the survey's pipeline"),
    "zwarn": Meaning("", "meta.code.qual", "Warning bits of the survey's redshift pipeline; 0 is good"),
    "class": Meaning("", "src.class", "Class by the survey's pipeline"),
    "subclass": Meaning("", "src.class", "Subclass by the survey's pipeline"),
    "ebv": Meaning("mag", "phot.color.excess", "Galactic E(B-V) that the survey gives"),
    "status": Meaning("", "meta.code.status", "Why the spectrum is set aside, as bits; 0 for one that is used"),
    "reasons": Meaning("", "meta.note", "Why the spectrum is set aside, in words"),
    "file": Meaning("", "meta.id;meta.file", "File of the survey"),
    "note": Meaning("", "meta.note", "What is to be said of this row, such as why it could not be read"),
    "snr": Meaning("", "stat.snr", "Median over the good pixels of flux / sigma"),
    "total_snr": Meaning("", "stat.snr", "Root of the sum over the good pixels of (flux / sigma)^2"),
    "coverage": Meaning("", "", "Share of the grid's pixels that are good"),
    "span": Meaning("", "", "Share of the grid between its first and its last good pixel"),
    "norm": Meaning(FLUX_UNIT, "arith.factor", "Prepared flux times this is the flux in the survey's unit"),
    "plate": Meaning("", "meta.id", "Plate"),
    "mjd": Meaning("d", "time.epoch", "Modified Julian date of the observation"),
    "lmjd": Meaning("d", "time.epoch", "Local modified Julian date of the observation"),
    "fiber": Meaning("", "meta.id", "Fiber"),
    "truth_z": Meaning("", "src.redshift", "True redshift of the simulation"),
    "anomaly": Meaning("", "meta.code", "Planted anomaly of the simulation; empty for none"),
    "anomaly_wave": Meaning("Angstrom", "em.wl", "Windows of the planted anomaly, vacuum, rest frame"),
    "latents": Meaning("", "", "Latent variables of the model"),
    "mse": Meaning("", "stat.fit.residual", "Mean squared residual of the reconstruction"),
    "mse_filtered": Meaning("", "stat.fit.residual", "As mse, without windows around emission lines"),
    "mse_trimmed": Meaning("", "stat.fit.residual", "As mse, without the largest residuals"),
    "mse_filtered_trimmed": Meaning("", "stat.fit.residual", "As mse_filtered, without the largest residuals"),
    "relative": Meaning("", "stat.fit.residual", "Mean squared residual, weighted by the inverse flux"),
    "relative_filtered": Meaning("", "stat.fit.residual", "As relative, without windows around emission lines"),
    "relative_trimmed": Meaning("", "stat.fit.residual", "As relative, without the largest residuals"),
    "relative_filtered_trimmed": Meaning("", "stat.fit.residual", "As relative_filtered, without the largest"),
    "rmse": Meaning("", "stat.fit.residual", "Root of the mean squared residual over good pixels, unit of the flux"),
    "difference": Meaning("", "stat.fit.residual", "Mean over good pixels of observed minus reconstructed flux"),
    "chi2": Meaning("", "stat.fit.chi2", "Mean over the good pixels of (residual / sigma)^2"),
    "matched": Meaning("", "meta.code", "Whether the value-added table holds this object"),
    "spectrum": Meaning("", "spect", "Prepared flux, inverse variance (0: masked), wavelengths (vacuum Angstrom)"),
    "_healpix_29": Meaning("", "pos.healpix", "HEALPix pixel of order 29, nested"),
}
