# SPDX-License-Identifier: Apache-2.0
"""What the order of the batches asks of a learning rate, and which order it is, told from the batches' numbers.

Must not know an optimizer or a search. The limits are derived in docs/learning-rate.md.
"""

from __future__ import annotations

import math

#: From this theta on, a reshuffled order sets no limit that depends on the number of batches.
ENOUGH_THETA = 0.2
#: Below it: what learning_rate * n times the largest curvature must not exceed, without theta.
RESHUFFLED_LIMIT = 5.4


def cyclic_limit(theta: float | None) -> float:
    """What learning_rate * n times the largest curvature must not exceed where batches come in the same order always.

    It is phi^2 / 2, with phi between pi and 2 pi where cot(phi / 2) = -theta * phi: from 4.93 without theta to 19.7.
    """
    low, high = math.pi, 2 * math.pi
    for _ in range(40):
        phi = (low + high) / 2
        # cos + theta * phi * sin of phi / 2 falls from above 0 to below it, and has no pole, unlike the cotangent.
        if math.cos(phi / 2) + (theta or 0.0) * phi * math.sin(phi / 2) > 0:
            low = phi
        else:
            high = phi
    return low**2 / 2


class OrderSeen:
    """Watches two passes from their beginning, and then tells in which order batches came.

    Args:
        n: the number of batches.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        #: the numbers of this pass, in their order, and those of the pass before; None: nothing is left to find out
        self._now: dict[int, None] | None = {}
        self._before: list[int] | None = None

    def add(self, index: int) -> str | None:
        """Take note of a batch's number. Returns "sequential" or "reshuffle" once, with the last of both passes.

        A batch that comes twice in a pass shows that it is neither, or that the watch began within a pass.
        """
        if self._now is None:
            return None
        if index in self._now:
            self._now = None
            return None
        self._now[index] = None
        if len(self._now) < self._n:
            return None
        if self._before is None:
            self._before, self._now = list(self._now), {}
            return None
        came, self._now = list(self._now), None
        return "sequential" if came == self._before else "reshuffle"
