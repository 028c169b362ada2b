"""The score is a mixture with the right prior; classes are the catalogue's, then the likeliest; rows stay in place."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from distspec.config import Spline
from distspec.errors import ConfigError
from distspec.models.flows import density
from distspec.models.flows.density import Flow, Labelled, LatentDensity, classes_of, fit_classes, frequencies, label_of
from distspec.models.flows.sliced_flow import SlicedFlow
from distspec.models.flows.spline_flow import SplineFlow

pytestmark = pytest.mark.numeric

MEANS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
WIDTHS = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


class Gaussians(nn.Module):
    """A flow whose classes are round Gaussians, as simple as the contract allows."""

    def __init__(self, means: Tensor, widths: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("widths", widths)
        self.classes, self.latents = means.shape
        self.shape = {"classes": self.classes, "latents": self.latents}
        self.most_rows = 0

    def to_normal(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        width = self.widths[label]
        return (z - self.means[label]) / width[:, None], -self.latents * width.log()

    def from_normal(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        width = self.widths[label]
        return x * width[:, None] + self.means[label], -self.latents * width.log()

    def log_prob(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        x, volume = self.to_normal(z, label)
        return volume - 0.5 * x.square().sum(dim=1) - 0.5 * self.latents * np.log(2 * np.pi)

    def log_prob_all(self, z: Tensor) -> Tensor:
        self.most_rows = max(self.most_rows, len(z))
        return torch.stack([self.log_prob(z, torch.full((len(z),), c)) for c in range(self.classes)], dim=1)

    def sample(self, n: int, label: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        return self.from_normal(torch.randn(n, self.latents, generator=generator), label)[0]


def three(counts: Any = (70, 20, 10)) -> LatentDensity:
    return LatentDensity(Gaussians(MEANS, WIDTHS), ("A", "B", "C"), torch.tensor(counts, dtype=torch.float64))


def points(count: int = 50) -> Tensor:
    return 4 * torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def conditional(z: Tensor) -> np.ndarray:
    laws = [multivariate_normal(mean, width**2) for mean, width in zip(MEANS.numpy(), WIDTHS.numpy(), strict=True)]
    return np.stack([law.logpdf(z.double().numpy()) for law in laws], axis=1)


# --- score -----------------------------------------------------------------------------------------------------------


def test_the_score_is_minus_the_log_of_the_mixture() -> None:
    z = points()
    prior = np.array([0.7, 0.2, 0.1])
    expected = -logsumexp(conditional(z) + np.log(prior), axis=1)
    found = three().score(z)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(three().log_prob(z), -expected, rtol=1e-12)


def test_the_posterior_is_bayes_rule() -> None:
    z = points()
    expected = softmax(conditional(z) + np.log([0.7, 0.2, 0.1]), axis=1)
    np.testing.assert_allclose(three().posterior(z), expected, rtol=1e-5, atol=1e-12)


def test_the_likeliest_class_knows_no_prior() -> None:
    z = points()
    expected = conditional(z).argmax(axis=1)
    for counts in ((70, 20, 10), (1, 1, 10**6)):
        np.testing.assert_array_equal(three(counts).likeliest(z), expected)
    assert (three((1, 1, 10**6)).posterior(z).argmax(dim=1).numpy() != expected).any()


def test_identical_classes_are_one_class() -> None:
    both = LatentDensity(Gaussians(MEANS[[0, 0]], WIDTHS[[0, 0]]), ("A", "B"), torch.tensor([3.0, 1.0]))
    one = LatentDensity(Gaussians(MEANS[:1], WIDTHS[:1]), ("all",))
    torch.testing.assert_close(both.score(points()), one.score(points()))


def test_a_class_without_members_has_no_part() -> None:
    found = three((70, 0, 30))
    z = torch.cat([points(), MEANS.float(), torch.full((1, 2), 1e18)])
    expected = -logsumexp(conditional(z)[:, [0, 2]] + np.log([0.7, 0.3]), axis=1)
    np.testing.assert_allclose(found.score(z), expected, rtol=1e-6)
    assert (found.posterior(z)[:, 1] == 0).all()
    np.testing.assert_allclose(found.posterior(z).sum(dim=1), 1, rtol=1e-6)
    assert 1 not in found.likeliest(z)
    assert all(torch.isfinite(tensor).all() for tensor in found.state_dict().values())


def test_scores_beyond_the_range_of_the_output_stay_the_largest_number() -> None:
    found = three()
    assert found.score(torch.tensor([[1e30, 0.0]])) == torch.finfo(torch.float32).max


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_spoil_their_own_row_alone(bad: float) -> None:
    z = points(6)
    z[2, 1] = bad
    found, good = three(), torch.tensor([0, 1, 3, 4, 5])
    assert torch.isnan(found.score(z)[2])
    assert torch.isnan(found.posterior(z)[2]).all()
    assert found.likeliest(z)[2] == -1
    torch.testing.assert_close(found.score(z)[good], found.score(z[good]))


@pytest.mark.parametrize("count", [0, 1, 50])
def test_score_and_posterior_at_once(count: int) -> None:
    density, z = three((70, 0, 10)), points(count)
    z[: count // 10] = torch.nan
    score, posterior = density.score_and_posterior(z)
    for found, expected in ((score, density.score(z)), (posterior, density.posterior(z))):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, equal_nan=True, atol=0, rtol=0)


def test_many_rows_pass_in_parts_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    z = points(100)
    whole = three()
    expected = whole.score(z), whole.posterior(z), whole.likeliest(z)
    assert whole.flow.most_rows == 100  # type: ignore[attr-defined]
    monkeypatch.setattr(density, "_ROWS", 21)
    parted = three()
    for found, value in zip((parted.score(z), parted.posterior(z), parted.likeliest(z)), expected, strict=True):
        assert torch.equal(found, value)
    assert parted.flow.most_rows == 7  # type: ignore[attr-defined]


def test_no_rows_give_no_scores() -> None:
    z = points(0)
    assert three().score(z).shape == (0,)
    assert three().posterior(z).shape == (0, 3)
    assert three().likeliest(z).shape == (0,)


def test_log_prob_has_gradients_and_the_score_needs_none() -> None:
    z = points(5).requires_grad_()
    (gradient,) = torch.autograd.grad(three().log_prob(z).sum(), z)
    towards = three().posterior(z).double() / WIDTHS**2
    expected = (towards[:, :, None] * (MEANS - z.detach().double()[:, None])).sum(dim=1)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert not three().score(z).requires_grad


@pytest.mark.parametrize("kind", ["spline", "sliced"])
def test_both_flows_serve(kind: str) -> None:
    flow: Flow = SplineFlow(Spline(transforms=1, hidden=(4,)), 2, 3) if kind == "spline" else SlicedFlow(2, 3)
    found = LatentDensity(flow, ("A", "B", "C"))
    z = points(8).requires_grad_()
    found.log_prob(z).sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    torch.testing.assert_close(-found.log_prob(z).float(), found.score(z))
    with torch.device("meta"):
        flow = SplineFlow(Spline(transforms=1, hidden=(4,)), 2, 3) if kind == "spline" else SlicedFlow(2, 3)
        described = LatentDensity(flow, ("A", "B", "C")).state_dict()
    assert {name: tensor.shape for name, tensor in described.items()} == {
        name: tensor.shape for name, tensor in found.state_dict().items()
    }


@pytest.mark.parametrize("counts", [(1, 2), (0, 0, 0), (1, -1, 2), (1, np.nan, 2)])
def test_counts_that_make_no_prior_are_refused(counts: Any) -> None:
    with pytest.raises(ValueError, match="counts"):
        three(counts)


def test_names_and_classes_agree_in_number() -> None:
    with pytest.raises(ValueError, match="2 names for a flow of 3 classes"):
        LatentDensity(Gaussians(MEANS, WIDTHS), ("A", "B"))


# --- classes of the catalogue ----------------------------------------------------------------------------------------


def columns() -> list[np.ndarray]:
    return [
        np.array(["QSO", "GALAXY", "GALAXY", "STAR", "GALAXY"]),
        np.array(["BROADLINE", "", "STARFORMING", "", " "]),
    ]


def test_a_class_is_a_combination_of_values() -> None:
    label, names = classes_of(columns())
    assert names == ("GALAXY STARFORMING", "GALAXY none", "QSO BROADLINE", "STAR none")
    assert label.tolist() == [2, 1, 0, 3, 1]
    assert label.dtype == np.int64


def test_the_order_of_rows_does_not_change_the_names(rng: np.random.Generator) -> None:
    label, names = classes_of(columns())
    order = rng.permutation(5)
    again, same = classes_of([column[order] for column in columns()])
    assert same == names
    np.testing.assert_array_equal(again, label[order])


@pytest.mark.parametrize(
    "convert",
    [
        lambda column: column.astype("S"),
        lambda column: column.astype(object),
        lambda column: column.astype(np.dtypes.StringDType()),
        lambda column: np.array([value or None for value in column.tolist()], dtype=object),
    ],
)
def test_texts_are_the_same_however_they_are_kept(convert: Any) -> None:
    label, names = classes_of([convert(column) for column in columns()])
    assert names == classes_of(columns())[1]
    np.testing.assert_array_equal(label, classes_of(columns())[0])


def test_numbers_are_classes_too() -> None:
    assert classes_of([np.array([10, 2, 10])])[1] == ("10", "2")
    assert classes_of([np.array([True, False])])[1] == ("False", "True")


def test_too_many_classes_are_refused_in_one_line() -> None:
    assert len(classes_of([np.arange(256)])[1]) == 256
    with pytest.raises(ConfigError, match="257 different classes.*at most 256") as caught:
        classes_of([np.arange(257)])
    assert "\n" not in str(caught.value)


def test_labels_against_known_names() -> None:
    label, names = classes_of(columns())
    np.testing.assert_array_equal(label_of(columns(), names), label)
    # Not limited in number, and unknown ones are told.
    np.testing.assert_array_equal(label_of([np.arange(1000)], ("7", "none")), np.where(np.arange(1000) == 7, 0, -1))
    assert label_of([np.array([], "U1")], names).shape == (0,)


def test_no_columns_make_no_classes() -> None:
    with pytest.raises(ValueError, match="no label columns"):
        classes_of([])


def test_frequencies_add_up() -> None:
    labels = torch.tensor([0, 2, 2, -1, 0, 0])
    assert frequencies(labels, 4).tolist() == [3, 0, 2, 0]
    weights = torch.tensor([1.0, 0.5, 0.25, 9.0, 2.0, 0.0])
    assert frequencies(labels, 4, weights).tolist() == [3, 0, 0.75, 0]
    parts = frequencies(labels[:2], 4, weights[:2]) + frequencies(labels[2:], 4, weights[2:])
    assert torch.equal(parts, frequencies(labels, 4, weights))
    assert frequencies(labels[:0], 2).tolist() == [0, 0]


# --- the fit ---------------------------------------------------------------------------------------------------------


def gaussians_fit(latents: Tensor, classes: int, calls: list[Any]) -> Any:
    """A fit that is exact for round Gaussians."""

    def fit(training: Tensor, validation: Tensor, stage: str) -> Gaussians:
        calls.append((stage, training.clone(), validation.clone()))
        parts = [latents[training == c].double() for c in range(classes)]
        empty = torch.zeros(latents.shape[1], dtype=torch.float64)
        means = torch.stack([part.mean(dim=0) if len(part) else empty for part in parts])
        widths = torch.stack([part.std(dim=0).mean() if len(part) > 1 else torch.ones(()).double() for part in parts])
        return Gaussians(means, widths)

    return fit


def mislabelled() -> tuple[Labelled, Labelled, Tensor, Tensor]:
    """Three separate clouds; a share of the rows has another's label."""
    generator = torch.Generator().manual_seed(2)
    true = torch.randint(0, 3, (3000,), generator=generator)
    latents = 0.3 * torch.randn(3000, 2, generator=generator) + MEANS[true].float()
    labels = true.clone()
    wrong = torch.rand(3000, generator=generator) < 0.1
    labels[wrong] = (labels[wrong] + 1) % 3
    return Labelled(latents[:2000], labels[:2000]), Labelled(latents[2000:], labels[2000:]), true[:2000], true[2000:]


def test_relabelling_finds_the_right_classes_and_fits_again() -> None:
    training, validation, true, held = mislabelled()
    before = training.labels.clone()
    calls: list[Any] = []
    found, facts = fit_classes(gaussians_fit(training.latents, 3, calls), training, validation, ("A", "B", "C"))
    assert [call[0] for call in calls] == ["catalogue", "relabelled"]
    assert torch.equal(calls[0][1], training.labels)
    assert torch.equal(calls[0][2], validation.labels)
    assert torch.equal(calls[1][1], true)
    assert torch.equal(calls[1][2], held)
    torch.testing.assert_close(found.log_prior.exp(), frequencies(true, 3) / 2000)
    assert not found.training
    assert torch.equal(training.labels, before)
    changed = (before != true).double()
    assert facts["relabelled"] == pytest.approx(float(changed.mean()))
    assert facts["relabelled_validation"] == pytest.approx(float((validation.labels != held).double().mean()))
    for index, name in enumerate("ABC"):
        assert facts["classes"][name] == {
            "catalogue": int((before == index).sum()),
            "fitted": int((true == index).sum()),
            "relabelled": pytest.approx(float(changed[before == index].mean())),
        }
    assert sum(move["count"] for move in facts["moves"]) == int(changed.sum())
    assert {(move["from"], move["to"]) for move in facts["moves"]} == {("A", "C"), ("B", "A"), ("C", "B")}
    counts = [move["count"] for move in facts["moves"]]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(("classes", "relabel"), [(3, False), (1, True)])
def test_one_pass_where_there_is_nothing_to_relabel(classes: int, relabel: bool) -> None:
    training, validation, _, _ = mislabelled()
    training, validation = (part._replace(labels=part.labels.clamp_max(classes - 1)) for part in (training, validation))
    calls: list[Any] = []
    fit = gaussians_fit(training.latents, classes, calls)
    found, facts = fit_classes(fit, training, validation, ("A", "B", "C")[:classes], relabel=relabel)
    assert [call[0] for call in calls] == ["catalogue"]
    torch.testing.assert_close(found.log_prior.exp(), frequencies(training.labels, classes) / 2000)
    assert facts["relabelled"] == facts["relabelled_validation"] == 0
    assert facts["moves"] == []


def test_a_row_without_a_class_is_given_one() -> None:
    training, validation, true, _ = mislabelled()
    training.labels[:5] = -1
    calls: list[Any] = []
    _, facts = fit_classes(gaussians_fit(training.latents, 3, calls), training, validation, ("A", "B", "C"))
    assert torch.equal(calls[1][1], true)
    assert sum(part["catalogue"] for part in facts["classes"].values()) == 1995
    assert sum(part["fitted"] for part in facts["classes"].values()) == 2000
    assert sum(move["count"] for move in facts["moves"] if move["from"] == "unknown") == 5


def test_a_class_that_loses_all_its_members_does_no_harm() -> None:
    training, validation, true, _ = mislabelled()
    labels = true.clone()
    labels[:2] = 3  # a fourth class of two rows that belong to others
    calls: list[Any] = []
    fit = gaussians_fit(training.latents, 4, calls)
    found, facts = fit_classes(fit, Labelled(training.latents, labels), validation, ("A", "B", "C", "D"))
    if facts["classes"]["D"]["fitted"] == 0:
        assert (found.posterior(training.latents)[:, 3] == 0).all()
    assert torch.isfinite(found.score(training.latents)).all()


def test_workers_add_their_counts() -> None:
    training, validation, true, _ = mislabelled()

    class Twice:
        """As if another worker had the same rows."""

        def double(self, values: Tensor) -> Tensor:
            return 2 * values

        sum = minimum = maximum = gather = broadcast = double

    weights = torch.linspace(0, 1, 2000)
    fit = gaussians_fit(training.latents, 3, [])
    found, facts = fit_classes(fit, training, validation, ("A", "B", "C"), group=Twice(), weights=weights)
    alone = fit_classes(fit, training, validation, ("A", "B", "C"), weights=weights)
    assert facts["classes"]["A"]["fitted"] == 2 * int((true == 0).sum())
    assert facts["relabelled"] == alone[1]["relabelled"]
    assert torch.equal(found.log_prior, alone[0].log_prior)
    expected = frequencies(true, 3, weights)
    torch.testing.assert_close(found.log_prior.exp(), expected / expected.sum())
