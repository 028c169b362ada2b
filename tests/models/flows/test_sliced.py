"""The flow and its fit: analytic densities, classes, shards, resumption, degenerate data."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from distspec.config import Sliced
from distspec.models.flows.sliced import Layers, Sample, fit_sliced
from distspec.models.flows.sliced_flow import SlicedFlow
from distspec.models.training.group import Alone, Group, Together
from tests.support.processes import PATIENCE

pytestmark = pytest.mark.numeric

F64 = torch.float64


def normal(n: int, D: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bent(n: int, seed: int = 0) -> Tensor:
    """A three-dimensional sample that no linear map makes Gaussian."""
    z = normal(n, 3, seed)
    return torch.stack([z[:, 0], z[:, 1] * 0.5 + z[:, 0].square(), z[:, 2] + 2 * z[:, 0].sign()], dim=1)


def sample(latents: Tensor, labels: Tensor | None = None, weights: Tensor | None = None) -> Sample:
    rows = torch.arange(len(latents))
    return Sample(latents, torch.zeros_like(rows) if labels is None else labels, rows, weights)


def fitted(latents: Tensor, labels: Tensor | None = None, classes: int = 1, **settings: object) -> SlicedFlow:
    """Fit exactly so many layers (4 unless told)."""
    layers = settings.pop("layers", 4)
    chosen = Sliced.model_validate({"layers": layers, "patience": 100, **settings})
    flows = []
    data = sample(latents, labels)
    best = fit_sliced(chosen, data, data, classes, seed=1, on_layer=lambda flow, _: flows.append(flow))
    return flows[-1] if flows else best


@pytest.fixture(scope="module")
def flow() -> SlicedFlow:
    labels = torch.arange(900) % 3
    return fitted(bent(900) * (1 + labels[:, None]), labels, 3, knots=20)


# --- the map ----------------------------------------------------------------------------------------------------------


def test_there_and_back(flow: SlicedFlow) -> None:
    z, labels = bent(300, seed=5) * 3, torch.arange(300) % 3
    x, volume = flow.to_normal(z, labels)
    back, again = flow.from_normal(x, labels)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=0)
    torch.testing.assert_close(again, volume, atol=1e-9, rtol=0)


def test_volume_is_the_jacobian(flow: SlicedFlow) -> None:
    for label in range(3):
        z = bent(1, seed=label)[0]
        jacobian = torch.autograd.functional.jacobian(
            lambda row, label=label: flow.to_normal(row[None], torch.tensor([label]))[0][0], z
        )
        volume = flow.to_normal(z[None], torch.tensor([label]))[1][0]
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, volume, atol=1e-10, rtol=0)


def test_gradient_of_log_prob_is_its_slope(flow: SlicedFlow) -> None:
    z, labels, change = bent(20, seed=9).requires_grad_(), torch.arange(20) % 3, normal(20, 3, 4)
    (gradient,) = torch.autograd.grad(flow.log_prob(z, labels).sum(), z)
    ahead, behind = (flow.log_prob(z.detach() + step * change, labels) for step in (1e-6, -1e-6))
    # A knot may lie between the two, where the slope jumps.
    close = ((ahead - behind) / 2e-6 - (gradient * change).sum(dim=1)).abs() < 1e-4
    assert close.sum() >= 19


def test_all_classes_at_once(flow: SlicedFlow) -> None:
    z = bent(50, seed=2).float()
    every = flow.log_prob_all(z)
    for label in range(3):
        torch.testing.assert_close(every[:, label], flow.log_prob(z, torch.full((50,), label)), atol=1e-10, rtol=0)
    assert every.dtype == F64


def test_classes_must_be_named(flow: SlicedFlow) -> None:
    with pytest.raises(ValueError, match="3 classes"):
        flow.log_prob(bent(2))
    with pytest.raises(ValueError, match="a label is 3"):
        flow.log_prob(bent(2), torch.tensor([0, 3]))


def test_no_rows(flow: SlicedFlow) -> None:
    assert flow.log_prob(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert flow.log_prob_all(torch.zeros(0, 3)).shape == (0, 3)


def test_travels_by_shape_and_state(flow: SlicedFlow) -> None:
    with torch.device("meta"):
        empty = SlicedFlow(**flow.shape)
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in flow.state_dict().items()
    }
    copy = SlicedFlow(**flow.shape)
    z = bent(10)
    torch.testing.assert_close(copy.to_normal(z, torch.zeros(10, dtype=torch.long))[0], z)
    copy.load_state_dict(flow.state_dict())
    assert torch.equal(copy.log_prob_all(z), flow.log_prob_all(z))
    assert not list(flow.parameters())


# --- densities that are known -----------------------------------------------------------------------------------------


def test_density_of_a_gaussian() -> None:
    data, new = normal(20_000, 10), normal(20_000, 10, seed=1)
    linear = fitted(data, layers=1)
    expected = -5 * math.log(2 * math.pi * math.e)
    assert expected == pytest.approx(-14.189385, abs=1e-6)
    entropy = float((-0.5 * new.square().sum(dim=1)).mean()) - 5 * math.log(2 * math.pi)
    assert float(linear.log_prob(new).mean()) == pytest.approx(entropy, abs=0.01)
    assert float(linear.log_prob(new).mean()) == pytest.approx(expected, abs=0.04)


def test_linear_map_alone_is_the_gaussian_of_equal_covariance() -> None:
    turned = normal(5_000, 4) @ normal(4, 4, seed=7) + 3
    flow = SlicedFlow(4)
    judged = sample(turned)
    # A patience of one layer that helps nothing leaves the linear map.
    flow = fit_sliced(Sliced(layers=1, regularization=(1.0, 1.0)), judged, judged, 1, 0)
    covariance = torch.cov(turned.T)
    expected = -0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    assert float(flow.log_prob(turned).mean()) == pytest.approx(float(expected), abs=1e-3)


def test_a_layer_on_gaussian_data_gains_next_to_nothing() -> None:
    data = normal(5_000, 6)
    before, after = fitted(data, layers=1, regularization=(1.0, 1.0)), fitted(data, layers=1, regularization=(0.0, 0.0))
    gain = float(after.log_prob(data).mean() - before.log_prob(data).mean())
    assert abs(gain) < 6 * 70 / 5_000


def test_samples_look_like_the_data() -> None:
    data, new = bent(10_000), bent(10_000, seed=3)
    model = fit_sliced(Sliced(layers=12, regularization=(0.2, 0.9)), sample(data), sample(new[:2000]), 1, 0)
    drawn = model.sample(10_000, generator=torch.Generator().manual_seed(2))
    for axis in range(3):
        both = torch.cat([drawn[:, axis], new[:, axis]]).sort().values
        ours, theirs = (torch.searchsorted(part[:, axis].sort().values, both) / 10_000 for part in (drawn, new))
        assert float((ours - theirs).abs().max()) < 0.04
    linear = fit_sliced(Sliced(layers=1, regularization=(1.0, 1.0)), sample(data), sample(data), 1, 0)
    assert float(model.log_prob(new).mean() - linear.log_prob(new).mean()) > 0.5


def test_one_dimension() -> None:
    data = normal(4_000, 1).exp()
    model = fit_sliced(
        Sliced(layers=20, regularization=(0.0, 0.9)), sample(data), sample(normal(999, 1, 2).exp()), 1, 0
    )
    new = normal(4_000, 1, seed=4)
    exact = (-0.5 * new.square() - new).mean() - 0.5 * math.log(2 * math.pi)
    assert float(model.log_prob(new.exp()).mean()) == pytest.approx(float(exact), abs=0.06)


# --- classes and weights ----------------------------------------------------------------------------------------------


def test_equal_classes_give_the_model_without_classes() -> None:
    # The pooled objective would compare with the quantiles of three times the rows, and the unbiased covariance divides
    # by three times the rows less one: both would differ a little.
    data, same = bent(1_300), {"balance": True, "whiten": False}
    alone = fitted(data, **same)
    together = fitted(data.repeat(3, 1), torch.arange(3).repeat_interleave(1_300), 3, **same)
    for label in range(3):
        found = together.log_prob(data, torch.full((1_300,), label))
        torch.testing.assert_close(found, alone.log_prob(data), atol=1e-6, rtol=0)


def test_a_class_without_rows_takes_the_pooled_map() -> None:
    data, labels = bent(600), torch.zeros(600, dtype=torch.long)
    labels[:7] = 2
    labels[7] = 3
    model = fitted(data, labels, 4)
    every = model.log_prob_all(data)
    assert every.isfinite().all()
    # Few objects of the same population: near the pooled map, and near each other.
    assert float((every[:, 1] - every[:, 0]).abs().mean()) < 0.1
    assert float((every[:, 3] - every[:, 1]).abs().mean()) < 0.1


def test_each_class_is_whitened_by_itself() -> None:
    labels = torch.arange(900) % 3
    data = bent(900) @ normal(3, 3, seed=7) * (1 + labels[:, None]) + 5 * labels[:, None]
    flow = fit_sliced(
        Sliced(layers=1, patience=1, regularization=(1.0, 1.0)), sample(data, labels), sample(data, labels), 3, 0
    )
    white, _ = flow.with_layers([]).to_normal(data, labels)
    for label in range(3):
        part = white[labels == label]
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(3, dtype=F64), atol=1e-9, rtol=0)
        torch.testing.assert_close(torch.cov(part.T), torch.eye(3, dtype=F64), atol=1e-9, rtol=0)


def test_whitening_of_a_small_class_leans_on_the_pooled_data() -> None:
    data, labels = bent(400), (torch.arange(400) < 10).long()
    data[:10] = 0.1 * data[:10] + 3
    judged = sample(data, labels)
    flow = fit_sliced(Sliced(layers=1, shrink_below=40), judged, judged, 2, 0)
    # Ten of forty: a quarter is its own. Moments of the mixture, written out.
    own, share = data[:10], 0.75
    mean = (1 - share) * own.mean(dim=0) + share * data.mean(dim=0)
    second = (1 - share) * (torch.cov(own.T) + own.mean(dim=0).outer(own.mean(dim=0)))
    second += share * (torch.cov(data.T) + data.mean(dim=0).outer(data.mean(dim=0)))
    torch.testing.assert_close(flow.mean[1], mean, atol=1e-9, rtol=0)
    covariance = torch.linalg.inv(flow.whiten[1] @ flow.whiten[1])
    torch.testing.assert_close(covariance, second - mean.outer(mean), atol=1e-8, rtol=0)


def test_rows_without_a_class_are_left_out() -> None:
    data, labels = bent(300), torch.arange(300) % 4 - 1
    known = labels >= 0
    kept = Sample(data[known], labels[known], torch.arange(300)[known])
    settings = Sliced(layers=2)
    whole = fit_sliced(settings, sample(data, labels), sample(data, labels), 3, 0)
    torch.testing.assert_close(whole.state_dict(), fit_sliced(settings, kept, kept, 3, 0).state_dict())


def test_small_classes_without_shrinkage() -> None:
    data, labels = bent(300), torch.zeros(300, dtype=torch.long)
    labels[:2], labels[2] = 1, 2
    assert fitted(data, labels, 4, shrink_below=0).log_prob_all(data).isfinite().all()


def test_weights_of_zero_and_of_one() -> None:
    data = bent(800)
    weights = (torch.arange(800) % 2).double()
    settings = Sliced(layers=3, patience=50)
    half = Sample(data[1::2], torch.zeros(400, dtype=torch.long), torch.arange(1, 800, 2))
    plain = fit_sliced(settings, half, sample(data), 1, 0)
    weighted = fit_sliced(settings, sample(data, weights=weights), sample(data), 1, 0)
    torch.testing.assert_close(weighted.log_prob(data), plain.log_prob(data), atol=1e-6, rtol=0)


def test_integer_weights_are_repeated_rows() -> None:
    data = bent(2_000)
    times = 1 + torch.arange(2_000) % 2
    settings = Sliced(layers=2, patience=50, knots=30, regularization=(0.5, 0.9), whiten=False)
    repeated = fit_sliced(settings, sample(data.repeat_interleave(times, dim=0)), sample(data), 1, 0)
    weighted = fit_sliced(settings, sample(data, weights=times.double()), sample(data), 1, 0)
    # Scott's rule sees fewer independent rows in the weighted sample, and other random rows start the search.
    assert float((weighted.log_prob(data) - repeated.log_prob(data)).mean()) == pytest.approx(0, abs=0.03)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_resumed_fit_is_the_same() -> None:
    data, kept = sample(bent(700)), []
    settings = Sliced(layers=6, patience=50)
    whole = fit_sliced(
        settings, data, data, 1, 3, on_layer=lambda flow, history: kept.append((flow.state_dict(), history))
    )
    assert [len(history) for _, history in kept] == [1, 2, 3, 4, 5, 6]
    state, history = kept[2]
    start = SlicedFlow(**{**whole.shape, "layers": 3})
    start.load_state_dict(state)
    resumed = fit_sliced(settings, data, data, 1, 3, begun=Layers(start, history))
    for name, table in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], table), name


def test_start_and_history_must_agree(flow: SlicedFlow) -> None:
    data = sample(bent(60), torch.arange(60) % 3)
    layer = {"validation_log_prob": 0.0}
    with pytest.raises(ValueError, match="history of 1 layers"):
        fit_sliced(Sliced(), data, data, 3, 0, begun=Layers(flow, [layer]))
    with pytest.raises(ValueError, match="start of 0"):
        fit_sliced(Sliced(), data, data, 3, 0, begun=Layers(SlicedFlow(3, 3), [layer]))
    with pytest.raises(ValueError, match="3 latents of 3 classes, not 3 of 4"):
        fit_sliced(Sliced(), data, data, 4, 0, begun=Layers(flow, [layer] * 4))


def test_tables_follow_the_knots(flow: SlicedFlow) -> None:
    copy, z = SlicedFlow(**flow.shape), bent(40)
    before = copy.log_prob_all(z)
    copy.load_state_dict(flow.state_dict())
    torch.testing.assert_close(copy.log_prob_all(z), flow.log_prob_all(z))
    assert not torch.equal(before, copy.log_prob_all(z))
    with torch.no_grad():
        copy.y *= 1.5
    assert not torch.allclose(copy.log_prob_all(z), flow.log_prob_all(z))


def test_stops_by_patience_and_keeps_the_best() -> None:
    seen: list[list[dict[str, float]]] = []
    settings = Sliced(layers=60, patience=3, regularization=(0.0, 0.0), knots=50, bandwidth=0.2)
    flow = fit_sliced(
        settings, sample(bent(200)), sample(bent(200, seed=1)), 1, 0, on_layer=lambda _, history: seen.append(history)
    )
    values = [entry["validation_log_prob"] for entry in seen[-1]]
    best = max(range(len(values)), key=values.__getitem__) + 1
    assert len(values) < 60 and flow.shape["layers"] in (0, best)
    assert len(values) == flow.shape["layers"] + 3
    kept = float(flow.log_prob(bent(200, seed=1)).mean())
    assert kept == pytest.approx(values[best - 1], abs=1e-9) if flow.shape["layers"] else kept >= max(values)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(1, 3),
        torch.ones(40, 3),
        torch.arange(2.0).repeat(60)[:, None].repeat(1, 2),
        torch.cat([torch.zeros(100, 1), normal(100, 2).float()], dim=1),
        torch.randint(0, 3, (200, 3), generator=torch.Generator().manual_seed(0)).float(),
        torch.cat([normal(200, 2), torch.full((1, 2), 1e8)]),
    ],
)
def test_degenerate_data_end_in_finite_numbers(data: Tensor) -> None:
    flow = fitted(data, layers=3)
    assert flow.log_prob(data).isfinite().all()
    assert flow.log_prob(data + 1).isfinite().all()


def test_no_training_rows_are_refused() -> None:
    nothing = sample(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="no training rows"):
        fit_sliced(Sliced(), nothing, nothing, 1, 0)


def test_rows_that_are_not_finite_are_refused() -> None:
    data = bent(10)
    data[3, 1] = math.nan
    with pytest.raises(ValueError, match="1 rows are not finite"):
        fit_sliced(Sliced(), sample(data), sample(bent(5)), 1, 0)


# --- workers ----------------------------------------------------------------------------------------------------------


class Threads:
    """Workers that are threads of one process."""

    def __init__(self, workers: int) -> None:
        self.barrier = threading.Barrier(workers, timeout=PATIENCE)
        self.slots: list[Tensor] = [torch.empty(0)] * workers

    def worker(self, rank: int) -> Group:
        return _Worker(self, rank)


class _Worker:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank

    def _exchange(self, values: Tensor, merge: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self.threads.slots[self.rank] = values
        self.threads.barrier.wait()
        merged = merge(list(self.threads.slots)).clone()
        self.threads.barrier.wait()
        return merged

    def sum(self, values: Tensor) -> Tensor:
        return self._exchange(values, lambda parts: torch.stack(parts).sum(dim=0))

    def minimum(self, values: Tensor) -> Tensor:
        return self._exchange(values, lambda parts: torch.stack(parts).amin(dim=0))

    def maximum(self, values: Tensor) -> Tensor:
        return self._exchange(values, lambda parts: torch.stack(parts).amax(dim=0))

    def gather(self, values: Tensor) -> Tensor:
        return self._exchange(values, torch.cat)

    def broadcast(self, values: Tensor) -> Tensor:
        return self._exchange(values, lambda parts: parts[0])


def part_of(whole: Sample, shard: int, shards: int) -> Sample:
    """Give every so-many-th row; the first worker has most, the last none of the second class."""
    owner = whole.keys * whole.keys % 7 % shards
    owner = torch.where((whole.labels == 1) & (owner == shards - 1), torch.zeros_like(owner), owner)
    mine = owner == shard
    return Sample(whole.latents[mine], whole.labels[mine], whole.keys[mine])


@pytest.fixture(scope="module")
def survey() -> tuple[Sample, Sample]:
    labels = (torch.arange(2_000) % 5).clamp_max(1)
    return sample(bent(2_000), labels), sample(bent(500, seed=1), labels[:500])


SETTINGS = Sliced(layers=4, patience=50)


@pytest.mark.parametrize("shards", [2, 4])
def test_result_does_not_depend_on_how_rows_are_spread(survey: tuple[Sample, Sample], shards: int) -> None:
    training, validation = survey
    alone = fit_sliced(SETTINGS, training, validation, 2, 5, Alone())
    threads = Threads(shards)

    def work(rank: int) -> SlicedFlow:
        parts = (part_of(rows, rank, shards) for rows in survey)
        return fit_sliced(SETTINGS, *parts, 2, 5, threads.worker(rank))

    with ThreadPoolExecutor(shards) as pool:
        flows = list(pool.map(work, range(shards)))
    for flow in flows:
        found, expected = flow.log_prob(validation.latents, validation.labels), alone.log_prob(*_rows(validation))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert torch.equal(flow.x, flows[0].x)


def _rows(data: Sample) -> tuple[Tensor, Tensor]:
    return data.latents, data.labels


@pytest.mark.slow
def test_workers_in_processes(survey: tuple[Sample, Sample], tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path), survey), nprocs=2)
    training, validation = survey
    alone = fit_sliced(SETTINGS, training, validation, 2, 5)
    found = torch.load(tmp_path / "log_prob.pt", weights_only=True)
    torch.testing.assert_close(found, alone.log_prob(*_rows(validation)), atol=1e-5, rtol=0)


def _process(rank: int, folder: str, survey: tuple[Sample, Sample]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    flow = fit_sliced(SETTINGS, *(part_of(rows, rank, 2) for rows in survey), 2, 5, Together())
    if rank == 0:
        torch.save(flow.log_prob(*_rows(survey[1])), f"{folder}/log_prob.pt")
    dist.destroy_process_group()
