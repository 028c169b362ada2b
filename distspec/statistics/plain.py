"""How far lists of anomalies agree, what they lean towards, and how detectors join to one: mathematics, no files.

Two lists of g1 and g2 rows, drawn at random from the same n anomalies, share k rows with the chance P(k | n) =
C(g1, k) C(n - g1, g2 - k) / C(n, g2) of mean g1 g2 / n, so the overlap of two detectors tells how many there are.

References:
    Reis, Rotman, Poznanski, Prochaska & Wolf 2021, Astronomy and Computing: eqs. 1 and A.3, figs. 2 and 3.
    Chapman 1951, Univ. California Publ. Statistics 1, 131: an estimate from one overlap that is free of bias.
    Darroch 1958, Biometrika 45, 343: the likelihood of n from several lists depends on their distinct rows alone.
    Efron & Stein 1981, Annals of Statistics 9, 586: the jackknife's variance is not too small.
    Holm 1979, Scandinavian Journal of Statistics 6, 65.
"""

from typing import Any

import numpy as np


class Plain:
    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for what is unknown."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Plain):
        return value.to_dict()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
