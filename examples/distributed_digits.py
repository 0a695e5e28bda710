# SPDX-License-Identifier: Apache-2.0
"""Trains a softmax regression on scikit-learn's handwritten digits on any number of ranks, and compares with one.

    python examples/distributed_digits.py
    python -m paddle.distributed.launch --nproc_per_node 2 --backend gloo examples/distributed_digits.py
    python -m paddle.distributed.launch --gpus 0,1 examples/distributed_digits.py

The first is one process, the second two of them on the CPU, the third two GPUs; that one has not been tried. Rank 0
then trains once more alone, and prints how far the two losses are apart.
"""

from __future__ import annotations

import argparse
import sys
import zlib  # noqa: F401  Paddle 2.6 brings a zlib of its own, which breaks Python's unless that is loaded first
from typing import Callable

import paddle
from paddle import distributed, nn
from sklearn.datasets import load_digits

from paddle_asgd import ASGD, FixedBatchSampler

BATCH_SIZE = 120  # of all ranks together. The last batch has 117 digits, which two or four ranks cannot share evenly
LEARNING_RATE = 1.2  # half of the largest of 0.3, 0.6, 1.2 and 2.4, all of which converged
THETA = 0.3  # how much of a gradient's change enters a step at once: docs/learning-rate.md
WEIGHT_DECAY = 0.01
TOLERANCE = 1e-12  # of the loss, relative, in float64: the ranks add the same numbers in another order


def load_data() -> tuple[list, tuple]:
    """The digits one by one, and as one pair of tensors."""
    images, labels = load_digits(return_X_y=True)  # 1797 images of 8 x 8 pixels, from 0 to 16
    images, labels = images / 16, labels.astype("int64")
    return list(zip(images, labels)), (paddle.to_tensor(images), paddle.to_tensor(labels))


def train(
    digits: list, epochs: int, seed: int, ranks: int, rank: int, wrap: Callable[[nn.Layer], nn.Layer]
) -> tuple[nn.Layer, ASGD]:
    """The network and its optimizer after these epochs, the same on all ranks.

    Args:
        seed: must be the same on all ranks, or they would have parts of different batches.
        wrap: what the network becomes where several ranks train it.
    """
    network = nn.Linear(64, 10, weight_attr=nn.initializer.Constant(0.0))
    model = wrap(network)
    sampler = FixedBatchSampler(digits, BATCH_SIZE // ranks, "reshuffle", seed=seed, num_replicas=ranks, rank=rank)
    loader = paddle.io.DataLoader(digits, batch_sampler=sampler)
    optimizer = ASGD(
        LEARNING_RATE,
        sampler.batch_num,
        network.parameters(),
        weight_decay=WEIGHT_DECAY,
        batch_weights=sampler.batch_weights,
        theta=THETA,
    )
    for _ in range(epochs):
        for batch_index, (images, labels) in sampler.enumerate(loader):
            loss = nn.functional.cross_entropy(model(images), labels)
            # The mean over the ranks' losses is not that over the batch if one rank has more digits than another.
            sampler.part_loss(batch_index, loss).backward()
            optimizer.batch_index = batch_index
            optimizer.step()
            optimizer.clear_grad()
    return network, optimizer


def objective(network: nn.Layer, digits: tuple) -> float:
    """What is minimised: the loss over all digits, and half of the decay times the squared parameters."""
    images, labels = digits
    with paddle.no_grad():
        squares = sum(float(param.square().sum()) for param in network.parameters())
        return float(nn.functional.cross_entropy(network(images), labels)) + WEIGHT_DECAY / 2 * squares


def report(name: str, network: nn.Layer, optimizer: ASGD, digits: tuple) -> float:
    loss = objective(network, digits)
    print(f"  {name:9}  {loss:.15f}  {optimizer.gradient_norm():.1e}")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on handwritten digits on several ranks, and on one.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of what is in a batch, and of the order of the batches")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs: received {arguments.epochs}, expected at least 1")
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    if BATCH_SIZE % ranks:
        parser.error(f"received {ranks} ranks, expected a number that divides {BATCH_SIZE}")
    paddle.set_default_dtype("float64")
    if ranks > 1:
        distributed.init_parallel_env()
    digits, whole = load_data()
    run = [digits, arguments.epochs, arguments.seed]
    trained = train(*run, ranks, rank, paddle.DataParallel if ranks > 1 else lambda network: network)
    if rank > 0:
        return
    print(f"{arguments.epochs} epochs of batches of {BATCH_SIZE} of {len(digits)} digits, on {paddle.get_device()}")
    print("             objective          gradient_norm()")
    shared = report(f"{ranks} rank{'s' if ranks > 1 else ''}", *trained, whole)
    if ranks == 1:
        print("Start it with python -m paddle.distributed.launch for several ranks.")
        return
    alone = report("1 process", *train(*run, 1, 0, lambda network: network), whole)
    difference = abs(shared - alone) / alone
    print(f"Relative difference {difference:.1e}, expected at most {TOLERANCE:.0e}.")
    if difference > TOLERANCE:
        sys.exit(f"{ranks} ranks came to another objective than one process.")


if __name__ == "__main__":
    main()
