"""The density of latents as an anomaly score, and the classes it is conditioned on.

    p(z) = Σ_c π_c p(z|c),    score = -log p(z)

p(z|c) is a flow conditioned on the class c, π_c the frequency of the class in the training set. Classes begin as the
catalogue's; Böhm, Kim & Juneau then give every spectrum the class that makes its latents likeliest, and fit again.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor, nn

from distspec.errors import ConfigError
from distspec.models.training.group import Alone, Group

__all__ = ["MOST_CLASSES", "Flow", "Labelled", "LatentDensity", "classes_of", "fit_classes", "frequencies", "label_of"]

MOST_CLASSES: Final = 256
"""A flow fits each class by itself; columns of more values than this are measurements, not classes."""

_EMPTY: Final = "none"
"""Name of an empty text, such as the subclass of most galaxies."""

_ROWS: Final = 1 << 16
"""Latents, each counted once per class, that pass through the flow at once."""

_NEVER: Final = -1e30
"""Stands for log 0, since weights on disk must be finite."""

_MOST_MOVES: Final = 100


class Flow(Protocol):
    """An invertible map of latents z to x that follow a standard normal distribution, given the class (`nn.Module`)."""

    @property
    def classes(self) -> int:
        """C."""
        ...

    @property
    def latents(self) -> int:
        """D."""
        ...

    @property
    def shape(self) -> dict[str, int]:
        """What the constructor needs beside settings to make equal state-dict shapes."""
        ...

    def to_normal(
        self, z: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
        """Map z to x, and give log |det dx/dz|."""
        ...

    def from_normal(
        self, x: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
        """Map x to z, and give log |det dx/dz| there."""
        ...

    def log_prob(self, z: Float[Tensor, "n D"], label: Int64[Tensor, "n"] | None = None) -> Float[Tensor, "n"]:
        """Give log p(z|c); the label may be none where there is one class, else ValueError."""
        ...

    def log_prob_all(self, z: Float[Tensor, "n D"]) -> Float[Tensor, "n classes"]:
        """Give log p(z|c) of every class."""
        ...

    def sample(
        self, n: int, label: Int64[Tensor, "n"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n D"]:
        """Draw z."""
        ...


class LatentDensity(nn.Module):
    """A flow with the frequencies of its classes: density of latents, and probability of classes.

    A class without members has probability zero everywhere: what a flow says of a class it never saw means nothing.
    Latents that are not finite have score and posterior NaN, and no class (-1).

    References:
        Böhm, Kim & Juneau (PAE), eqs. 5 (score) and 6 (class).

    Arguments:
        flow: p(z|c), fitted.
        names: of its classes.
        counts: number (or weight) of members of each class in the training set; none takes equal ones.

    Raises:
        ValueError: names, counts and classes of the flow differ in number, or no class has members.
    """

    flow: Flow
    log_prior: Tensor

    def __init__(self, flow: Flow, names: Sequence[str], counts: Float[Tensor, "C"] | None = None) -> None:
        super().__init__()
        if len(names) != flow.classes:
            raise ValueError(f"{len(names)} names for a flow of {flow.classes} classes")
        self.flow = flow
        self.names = tuple(names)
        self.register_buffer("log_prior", _log_prior(torch.ones(len(names)) if counts is None else counts, len(names)))

    def log_prob(self, latents: Float[Tensor, "n D"]) -> Float64[Tensor, "n"]:
        """Give log Σ_c π_c p(z|c), in nats, with gradients where they are asked for."""
        return self._in_batches(latents, lambda z: torch.logsumexp(self._joint(z), dim=1))

    @torch.no_grad()
    def score(self, latents: Float[Tensor, "n D"]) -> Float32[Tensor, "n"]:
        """Give the anomaly score -log Σ_c π_c p(z|c); higher = odder."""
        return self._in_batches(latents, lambda z: _score(self._joint(z))[:, 0])

    @torch.no_grad()
    def posterior(self, latents: Float[Tensor, "n D"]) -> Float32[Tensor, "n C"]:
        """Give p(c|z) = π_c p(z|c) / Σ_c π_c p(z|c)."""
        return self._in_batches(latents, lambda z: torch.softmax(self._joint(z), dim=1).float())

    @torch.no_grad()
    def score_and_posterior(self, latents: Float[Tensor, "n D"]) -> tuple[Float32[Tensor, "n"], Float32[Tensor, "n C"]]:
        """Give `score` and `posterior`, for the work of one."""

        def both(z: Tensor) -> Tensor:
            joint = self._joint(z)
            return torch.cat([_score(joint), torch.softmax(joint, dim=1).float()], dim=1)

        found = self._in_batches(latents, both)
        return found[:, 0], found[:, 1:]

    @torch.no_grad()
    def likeliest(self, latents: Float[Tensor, "n D"]) -> Int64[Tensor, "n"]:
        """Give argmax_c log p(z|c), without prior, among the classes with members (Böhm, Kim & Juneau, eq. 6)."""

        def best(z: Tensor) -> Tensor:
            conditional = self.flow.log_prob_all(z).masked_fill(self._empty, -torch.inf)
            return torch.where(torch.isfinite(z).all(dim=1), conditional.argmax(dim=1), -1)

        return self._in_batches(latents, best)

    @property
    def _empty(self) -> Tensor:
        return self.log_prior < 0.5 * _NEVER

    def _joint(self, z: Tensor) -> Tensor:
        """Give log π_c p(z|c); a batch has rows of NaN where z is not finite."""
        conditional: Tensor = self.flow.log_prob_all(z).double()
        joint = (conditional + self.log_prior).masked_fill(self._empty, -torch.inf)
        return torch.where(torch.isfinite(z).all(dim=1, keepdim=True), joint, torch.nan)

    def _in_batches(self, latents: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function of rows to a bounded number of rows at once; the result lies where the latents do."""
        if not len(latents):
            return function(latents.new_zeros((1, latents.shape[1])).to(self.log_prior.device))[:0].to(latents.device)
        rows = max(1, _ROWS // len(self.names))
        parts = (latents[start : start + rows].to(self.log_prior.device) for start in range(0, len(latents), rows))
        return torch.cat([function(part).to(latents.device) for part in parts])


def _score(joint: Float64[Tensor, "n C"]) -> Float32[Tensor, "n 1"]:
    # A score beyond the range of the output stays the largest number there is.
    most = torch.finfo(torch.float32).max
    return -torch.logsumexp(joint, dim=1, keepdim=True).clamp(-most, most).float()


def _log_prior(counts: Tensor, classes: int) -> Float64[Tensor, "C"]:
    if counts.shape != (classes,):
        raise ValueError(f"counts of shape {tuple(counts.shape)} for {classes} classes")
    counts = counts.double()
    if counts.device.type != "meta" and not (counts.min() >= 0 and 0 < counts.sum() < torch.inf):
        raise ValueError(f"counts of classes {counts.tolist()}; expected none negative, and one positive")
    return (counts / counts.sum()).log().clamp_min(_NEVER)


# --- classes of the catalogue ----------------------------------------------------------------------------------------


def classes_of(values: Sequence[Shaped[np.ndarray, "n"]]) -> tuple[Int64[np.ndarray, "n"], tuple[str, ...]]:
    """Make a class of each distinct combination of catalogue values.

    Arguments:
        values: one column each; a class is named by their texts in this order, with `none` for an empty one.

    Returns:
        Class of each row, and the names of the classes, sorted.

    Example:
        >>> classes_of([np.array(["QSO", "GALAXY", "GALAXY"]), np.array(["", "AGN", ""])])
        (array([2, 0, 1]), ('GALAXY AGN', 'GALAXY none', 'QSO none'))

    Raises:
        ConfigError: there are more than 256.
    """
    code, texts = _combinations(values)
    names = tuple(sorted(set(texts)))
    if len(names) > MOST_CLASSES:
        raise ConfigError(
            f"the label columns hold {len(names)} different classes, such as {names[0]!r}; at most {MOST_CLASSES} can "
            "be fitted; name columns of fewer values in labels"
        )
    return np.take(_numbers(texts, names), code), names


def label_of(values: Sequence[Shaped[np.ndarray, "n"]], names: Sequence[str]) -> Int64[np.ndarray, "n"]:
    """Find the class of each row among known ones; -1 where it is none of them."""
    code, texts = _combinations(values)
    return np.take(_numbers(texts, names), code)


def _numbers(texts: list[str], names: Sequence[str]) -> Int64[np.ndarray, "m"]:
    number = {name: index for index, name in enumerate(names)}
    return np.array([number.get(text, -1) for text in texts], dtype=np.int64)


def _combinations(values: Sequence[Shaped[np.ndarray, "n"]]) -> tuple[Int64[np.ndarray, "n"], list[str]]:
    """Number the distinct combinations of the columns' values, and name each."""
    if not values:
        raise ValueError("no label columns; give at least one")
    code, texts = np.zeros(len(values[0]), np.int64), [""]
    for column in values:
        # Objects of mixed types (a missing text is None) have no order.
        column = (
            np.array(["" if value is None else _text(value) for value in column]) if column.dtype == object else column
        )
        distinct, place = np.unique(column, return_inverse=True)
        pairs, code = np.unique(code * len(distinct) + place, return_inverse=True)
        own = [_text(value) or _EMPTY for value in distinct]
        texts = [f"{texts[pair // len(own)]} {own[pair % len(own)]}".lstrip() for pair in pairs]
    return code, texts


def _text(value: Any) -> str:
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip()


def frequencies(
    labels: Int64[Tensor, "n"], classes: int, weights: Float[Tensor, "n"] | None = None
) -> Float64[Tensor, "C"]:
    """Sum the weights (or count the rows) of each class; sums add up over workers. Label -1 is left out."""
    weights = torch.ones_like(labels, dtype=torch.float64) if weights is None else weights.double()
    known = labels >= 0
    return torch.bincount(labels[known], weights[known], minlength=classes)


# --- the fit ---------------------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """Latents with the class of each; -1 where it is not known."""

    latents: Float[Tensor, "n D"]
    labels: Int64[Tensor, "n"]


def fit_classes(
    fit: Callable[[Int64[Tensor, "n"], Int64[Tensor, "m"], str], Flow],
    training: Labelled,
    validation: Labelled,
    names: Sequence[str],
    *,
    relabel: bool = True,
    group: Group | None = None,
    weights: Float[Tensor, "n"] | None = None,
) -> tuple[LatentDensity, dict[str, Any]]:
    """Fit a flow to the classes of the catalogue; give every row its likeliest class; fit another flow to these.

    Rows are never reordered, so latents, labels and weights stay together. Without `relabel`, and with one class, the
    first flow is the answer.

    References:
        Böhm, Kim & Juneau, §2.3 and eq. 6: no prior in the choice of the class; the prior of the score is the frequency
        of the new classes in the training set.

    Arguments:
        fit: fits a flow to training and validation labels, given the name of the pass (`catalogue`, `relabelled`); it
            knows the latents, and leaves out rows of label -1.
        training: this worker's rows.
        validation: this worker's rows.
        names: of the classes.
        relabel: whether there is a second pass.
        group: adds up over workers; none where there is one.
        weights: of the training rows, in the prior; none counts them.

    Returns:
        The density, and facts of training rows: members of each class before and after, share that changed, the largest
        moves between classes; and the share of validation rows that changed.
    """
    group = group or Alone()
    classes = len(names)
    old = training.labels, validation.labels
    density = LatentDensity(fit(*old, "catalogue"), names, group.sum(frequencies(old[0], classes, weights))).eval()
    new = old
    if relabel and classes > 1:
        new = density.likeliest(training.latents), density.likeliest(validation.latents)
        counts = group.sum(frequencies(new[0], classes, weights))
        density = LatentDensity(fit(*new, "relabelled"), names, counts).eval()
    moves = [group.sum(_moves(first, second, classes)) for first, second in zip(old, new, strict=True)]
    facts = _facts(moves[0].cpu().numpy(), density.names)
    return density, facts | {"relabelled_validation": _changed(moves[1].cpu().numpy())}


def _moves(old: Int64[Tensor, "n"], new: Int64[Tensor, "n"], classes: int) -> Int64[Tensor, "C+1 C+1"]:
    """Count rows by old and new class; the last row and column hold those of none."""
    pairs = (old % (classes + 1)) * (classes + 1) + new % (classes + 1)
    return torch.bincount(pairs, minlength=(classes + 1) ** 2).view(classes + 1, classes + 1)


def _changed(moves: Int64[np.ndarray, "C+1 C+1"]) -> float:
    """Give the share of the rows with an old class that have another one now."""
    known = moves[:-1]
    return float((known.sum() - np.trace(known)) / max(1, known.sum()))


def _facts(moves: Int64[np.ndarray, "C+1 C+1"], names: tuple[str, ...]) -> dict[str, Any]:
    labels = (*names, "unknown")
    before, after, stayed = moves.sum(axis=1), moves.sum(axis=0), moves.diagonal()
    away = [(int(moves[i, j]), i, j) for i, j in zip(*np.nonzero(moves), strict=True) if i != j]
    away.sort(key=lambda move: (-move[0], *move[1:]))
    return {
        "classes": {
            name: {
                "catalogue": int(before[index]),
                "fitted": int(after[index]),
                "relabelled": float(1 - stayed[index] / before[index]) if before[index] else 0.0,
            }
            for index, name in enumerate(names)
        },
        "relabelled": _changed(moves),
        "moves": [{"from": labels[i], "to": labels[j], "count": count} for count, i, j in away[:_MOST_MOVES]],
    }
