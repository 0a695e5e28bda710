# SPDX-License-Identifier: Apache-2.0
"""What the order of the batches demands of a learning rate, and which order it is, told from the batches' numbers.

Must not know an optimizer or a search. The limits are derived in docs/learning-rate.md.
"""

from __future__ import annotations

import math

#: From this theta on, a reshuffled order sets no limit that depends on the number of batches.
ENOUGH_THETA = 0.2
#: What learning_rate * n times the largest curvature must not exceed in a reshuffled order with a smaller theta;
#: measured without theta.
RESHUFFLED_LIMIT = 5.4


def cyclic_limit(theta: float | None) -> float:
    """Limit of ``learning_rate * n`` times the largest curvature if batches always come in the same order.

    The limit is phi^2 / 2, with phi between pi and 2 pi where cot(phi / 2) = -theta * phi. It is 4.93 without theta and
    tends to 19.7 as theta grows. It holds for large n.

    Args:
        theta: the optimizer's; None or 0 for SAG.

    Examples:
        >>> round(cyclic_limit(None), 2), round(cyclic_limit(0.3), 2)
        (4.93, 13.16)
    """
    low, high = math.pi, 2 * math.pi
    for _ in range(40):
        phi = (low + high) / 2
        # The equation times the sine: a function that falls from above 0 to below it and, unlike the cotangent, has no
        # pole.
        if math.cos(phi / 2) + (theta or 0.0) * phi * math.sin(phi / 2) > 0:
            low = phi
        else:
            high = phi
    return low**2 / 2


class OrderSeen:
    """Watches two passes from their beginning, and then tells in which order the batches came.

    Args:
        n: the number of batches.

    Examples:
        >>> seen = OrderSeen(3)
        >>> [seen.add(index) for index in (2, 0, 1, 0, 1, 2)]
        [None, None, None, None, None, 'reshuffle']
    """

    def __init__(self, n: int) -> None:
        self._n = n
        #: the numbers of this pass in their order; None when nothing is left to find out
        self._now: dict[int, None] | None = {}
        #: those of the pass before
        self._before: list[int] | None = None

    def add(self, index: int) -> str | None:
        """Take note of the number of the batch that comes next.

        A batch that comes twice within n steps shows that the order is neither, or that the watch began in the middle
        of a pass; then the answer stays None.

        Args:
            index: the number of the batch.

        Returns:
            "sequential" or "reshuffle" once, with the last batch of the second pass; otherwise None.
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
