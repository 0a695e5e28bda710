# SPDX-License-Identifier: Apache-2.0
"""A rank that is killed in the middle of a step: the others end, say why, and the last checkpoint is good.

Must not test what a rank computes (test_data_parallel.py, test_sharding.py).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.nn.functional import mse_loss
from ranks import ends, started
from test_data_parallel import dataset, sampler_of
from test_sharding import network

from paddle_asgd import ASGD

PASSES, FATAL = 5, 11


class Run:
    """A training that is saved after each pass, and may be resumed on another number of ranks."""

    def __init__(self, ranks: int, rank: int, wrap: Any) -> None:
        self.layers, self.sampler, self.rank = network(), sampler_of(ranks, rank), rank
        self.model = wrap(self.layers)
        weights = {"batch_weights": self.sampler.batch_weights}
        self.optimizer = ASGD(0.05, self.sampler.batch_num, self.layers.parameters(), theta=0.3, **weights)

    def train(self, last: int, folder: Path | None = None) -> None:
        loader = paddle.io.DataLoader(dataset(), batch_sampler=self.sampler)
        while self.sampler.state_dict()["epoch"] < last:
            for index, (x, y) in self.sampler.enumerate(loader):
                self.optimizer.batch_index = index
                self.sampler.part_loss(index, mse_loss(self.model(x), y)).backward()
                self.optimizer.step()
                self.optimizer.clear_grad()
            if folder is not None and self.rank == 0:
                state = [one.state_dict() for one in (self.layers, self.optimizer, self.sampler)]
                paddle.save(state, str(folder / f"{self.sampler.state_dict()['epoch']}.pdstate"))

    def resume(self, path: Path) -> None:
        for one, state in zip((self.layers, self.optimizer, self.sampler), paddle.load(str(path))):
            one.set_state_dict(state)


def job(found: dict[str, Any], folder: Path) -> None:
    paddle.distributed.init_parallel_env()
    run = Run(2, paddle.distributed.get_rank(), paddle.DataParallel)
    steps = []

    def die(*_: Any) -> None:
        steps.append(None)
        if run.rank == 1 and len(steps) == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)

    run.optimizer.register_step_pre_hook(die)
    run.train(PASSES, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def ended(folder: Path) -> list[tuple[int | str, str]]:
    with started("test_lost_rank.job", folder, 2) as processes:
        return list(ends(processes, folder))


def test_the_other_rank_ends_and_says_why(ended: list[tuple[int | str, str]]) -> None:
    """The library that sums the gradients notices. It may abort the process, and names the connection in any case."""
    (code, said), (killed, _) = ended
    assert killed == -signal.SIGKILL
    assert code not in (0, "time limit")
    assert "gloo" in said
    assert "Connection reset by peer" in said or "Connection closed by peer" in said or "TIMEOUT" in said, said[-2000:]


def test_the_last_checkpoint_is_that_of_an_undisturbed_run(ended: list[tuple[int | str, str]], folder: Path) -> None:
    """It is resumed in one process, to the numbers of one process that was never interrupted."""
    last = max(folder.glob("*.pdstate"), key=lambda path: int(path.stem))
    assert int(last.stem) == (FATAL - 1) // 3
    resumed, whole = (Run(1, 0, lambda layers: layers) for _ in range(2))
    resumed.resume(last)
    resumed.train(PASSES)
    whole.train(PASSES)
    for one, other in zip(resumed.layers.parameters(), whole.layers.parameters()):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=1e-6 * np.abs(other.numpy()).max())
