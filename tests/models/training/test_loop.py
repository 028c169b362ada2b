"""The loop that fits networks, on a network small enough to know the answer of."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from distspec.config import Fit
from distspec.errors import ConfigError
from distspec.models.autoencoders.dense import Progress
from distspec.models.training import loop as training
from distspec.models.training.loop import best_weights, fit, learning_rate, newest_state


class Line(nn.Module):
    """y = w x; its loss is the squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        return (y - self.w * x).square().sum(), torch.tensor(len(x))


class Points:
    """Points on y = 3 x, in a new order every epoch; a worker may have a part of each batch."""

    steps = 8

    def __init__(self, y_of_validation: float = 3.0, part: slice = slice(None)) -> None:
        self._x = torch.linspace(-1, 1, 64)
        self._slope = y_of_validation
        self._part = part

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(64))
        for batch in order.split(8):
            mine = batch[self._part]
            yield self._x[mine], 3 * self._x[mine]

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = self._x[self._part]
        yield mine, self._slope * mine


def fitted(state: Path, settings: Fit, feed: Points | None = None) -> tuple[Line, list[dict[str, float]]]:
    line = Line()
    epochs = fit(line, line, feed or Points(), settings, state, 1)
    return line, epochs


def lasting(epochs: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in epoch.items() if k not in ("seconds", "waiting")} for epoch in epochs]


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
def test_every_optimizer_finds_the_slope(optimizer: str, tmp_path: Path) -> None:
    settings = Fit(epochs=40, optimizer=optimizer, learning_rate=0.1, final_learning_rate=0.001)
    line, epochs = fitted(tmp_path, settings)
    assert float(line.w.detach()) == pytest.approx(3.0, abs=0.05)
    assert epochs[-1]["validation_loss"] < 1e-3
    assert all(0 <= epoch["waiting"] <= 1 for epoch in epochs)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
@pytest.mark.parametrize("schedule", ["polynomial", "plateau", "one_cycle"])
def test_a_fit_that_was_killed_has_the_loss_curve_of_an_unbroken_one(
    optimizer: str, schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Fit(epochs=9, optimizer=optimizer, schedule=schedule, learning_rate=0.05, plateau=2, weight_decay=0.01)
    whole, unbroken = fitted(tmp_path / "a", settings)
    keep = training.keep_state

    def killed(state: Path, number: int, *rest: object) -> None:
        keep(state, number, *rest)
        if number == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "keep_state", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "b", settings)
    monkeypatch.setattr(training, "keep_state", keep)
    again, epochs = fitted(tmp_path / "b", settings)
    assert lasting(epochs) == lasting(unbroken)
    assert torch.equal(again.w, whole.w)
    # A damaged newest state costs an epoch.
    newest, _ = newest_state(tmp_path / "b")
    assert newest is not None
    (newest / "model.safetensors").write_bytes(b"half")
    assert len(newest_state(tmp_path / "b")[1]) == 8


SHARED = Fit(epochs=6, learning_rate=0.1, optimizer="sgd", clip=0.5)


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one_however_unequal_their_parts(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    alone, epochs = fitted(tmp_path / "alone", SHARED)
    found = best_weights(tmp_path / "together")
    torch.testing.assert_close(found["w"], alone.w.detach(), atol=1e-6, rtol=0)
    together = newest_state(tmp_path / "together")[1]
    assert len(together) == len(epochs)
    assert [epoch["train_loss"] for epoch in together] == pytest.approx([epoch["train_loss"] for epoch in epochs])


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    fitted(Path(folder) / "together", SHARED, Points(part=[slice(0, 2), slice(2, None)][rank]))
    # The first worker writes the states; if the other one leaves meanwhile, gloo's threads abort it.
    dist.barrier()
    dist.destroy_process_group()


def test_the_best_weights_are_kept_and_patience_ends_the_fit(tmp_path: Path) -> None:
    # The validation set wants slope 1: on the way to 3 the loss falls first and then rises.
    settings = Fit(epochs=100, learning_rate=0.05, patience=4, optimizer="sgd", final_learning_rate=0.05)
    line, epochs = fitted(tmp_path, settings, Points(1.0))
    losses = [epoch["validation_loss"] for epoch in epochs]
    assert len(epochs) == int(np.argmin(losses)) + 1 + 4
    assert float(line.w.detach()) == pytest.approx(float(best_weights(tmp_path)["w"]))
    assert abs(float(line.w.detach()) - 1) < abs(float(best_weights(tmp_path, "model")["w"]) - 1)


def test_what_is_not_better_by_min_delta_is_not_better() -> None:
    losses = [{"validation_loss": loss} for loss in (1.0, 0.95, 0.91, 0.85)]
    assert training._since_best(Fit(min_delta=0.1), losses) == 0
    assert training._since_best(Fit(min_delta=0.2), losses) == 3
    assert training._since_best(Fit(), losses) == 0


def test_schedules_go_where_they_say() -> None:
    settings = Fit(learning_rate=1.0, final_learning_rate=0.1)
    assert [learning_rate(settings, step, 10, []) for step in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
    early = settings.model_copy(update={"decay_steps": 5})
    assert [learning_rate(early, step, 10, []) for step in (0, 5, 9)] == pytest.approx([1.0, 0.1, 0.1])
    cycle = settings.model_copy(update={"schedule": "one_cycle"})
    rates = [learning_rate(cycle, step, 100, []) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 25)
    assert int(np.argmax(rates)) == 30
    assert rates[-1] == pytest.approx(0.1)
    plateau = Fit(schedule="plateau", learning_rate=1.0, final_learning_rate=1e-3, plateau=2)
    losses = [1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.4]
    seen = [learning_rate(plateau, 0, 1, [{"validation_loss": v} for v in losses[:n]]) for n in range(8)]
    assert seen == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_loss_that_is_not_finite_ends_the_fit_and_leaves_no_state(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not finite in epoch 0; lower train.learning_rate \(now 1e\+30\)"):
        fitted(tmp_path, Fit(epochs=3, learning_rate=1e30, optimizer="sgd", final_learning_rate=1.0))
    assert newest_state(tmp_path) == (None, [])


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    line, _ = fitted(tmp_path, Fit(epochs=1, optimizer="sgd", learning_rate=1.0, final_learning_rate=1.0, clip=1e-3))
    assert 0 < float(line.w.detach()) <= 8e-3 + 1e-9


def test_sixteen_bits_are_good_enough_for_the_products(tmp_path: Path) -> None:
    line, epochs = fitted(tmp_path, Fit(epochs=20, learning_rate=0.1, precision="bfloat16"))
    assert line.w.dtype == torch.float32
    assert math.isfinite(epochs[-1]["validation_loss"])
    assert float(line.w.detach()) == pytest.approx(3.0, abs=0.1)
