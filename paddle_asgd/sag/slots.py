# SPDX-License-Identifier: Apache-2.0
"""Which slot of the history the next step uses: the batch index, who must give it, and the clocks that count the slots.

Checks and bookkeeping on the host only; the same for a device is in csrc/asgd_slots.h. Must not know a formula.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle.base.framework import in_dygraph_mode, in_pir_mode

from ..arguments import dtype_name, is_tensor, refuse_state, shown
from ..caller import warn

#: The smallest weight of a batch, relative to the largest. Far below that, the product of a weight and a gradient would
#: be 0 in float32.
SMALLEST_WEIGHT = 1e-12


class SlotMismatchWarning(UserWarning):
    """Says that the history is of no use: slots hold gradients of other batches, or mixtures of several."""


class BatchIndex:
    """The slot of the next step, which the user gives and a step uses up.

    Args:
        n: the number of slots.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        #: whether an index was ever given; from then on every step needs one
        self.in_use = False
        self.next: Any = None
        #: two indices that were set between two steps, if the parameters' gradients contain those of both
        self.mixed: tuple[int, int] | None = None
        self._warned = False

    def checked(self, value: Any) -> Any:
        """Check a batch index.

        Args:
            value: an int of Python or NumPy, or a tensor of one int64; in static graphs a variable of one int64.

        Returns:
            An int, or the tensor if its value lies on a device and is checked there.

        Raises:
            TypeError: the value is of another kind, or suits another mode than the present one.
            ValueError: it is out of range.
        """
        if is_tensor(value):
            return self._checked_tensor(value)
        try:
            index = operator.index(value) if not isinstance(value, (bool, np.bool_)) else None
        except TypeError:
            index = None
        if index is None:
            raise TypeError(f"batch_index: received {shown(value)}, expected an int or a tensor of one int64")
        if not in_dygraph_mode():
            raise TypeError(
                f"batch_index: received {index} in static graph mode, where it would be the same in every run, "
                "expected an int64 variable that is fed: paddle.static.data('batch_index', [1], 'int64')"
            )
        return self._in_range(index)

    def _in_range(self, index: int) -> int:
        """Check that an index is at least 0 and below the number of slots, and return it."""
        if not 0 <= index < self._n:
            raise ValueError(
                f"batch_index: received {index}, expected 0 to {self._n - 1}, for batch_num is {self._n}; that must be "
                "the number of batches, such as sampler.batch_num"
            )
        return index

    def _checked_tensor(self, value: Any) -> Any:
        """Check a tensor's dtype, shape and mode. On the host it becomes an int; reading one on a device would wait."""
        shape = [abs(length) for length in value.shape]  # a variable's batch dimension is -1
        if dtype_name(value.dtype) != "int64" or shape not in ([], [1]):
            raise TypeError(
                f"batch_index: received a tensor of {dtype_name(value.dtype)} and shape {list(value.shape)}, expected "
                "an int or a tensor of one int64"
            )
        if isinstance(value, paddle.Tensor) != in_dygraph_mode():
            wanted = "a tensor" if in_dygraph_mode() else "a variable of the graph, as paddle.static.data gives"
            raise TypeError(f"batch_index: received {type(value).__name__}, expected {wanted}")
        if isinstance(value, paddle.Tensor) and value.place.is_cpu_place():
            return self._in_range(int(value.item()))
        return value

    def require(self) -> None:
        """Refuse a step without a batch index, as earlier steps had one, and an index that was set in another mode.

        Raises:
            TypeError: the index is a variable in dygraph, or a number in a static graph.
            ValueError: an index is in use, and there is none for this step.
        """
        in_graph = type(self.next) is not int and is_tensor(self.next) and not isinstance(self.next, paddle.Tensor)
        if self.next is not None and in_graph == in_dygraph_mode():
            wanted = "an int or a tensor" if in_graph else "a variable of the graph that the step is built into"
            raise TypeError(
                f"batch_index: received {shown(self.next)}, set in another mode than this step's, expected {wanted}; "
                "set it after paddle.enable_static() or disable_static(), and within a function that is traced"
            )
        if self.next is None:
            raise ValueError(
                f"batch_index: received none for this step, expected 0 to {self._n - 1}, as earlier steps had one; set "
                "optimizer.batch_index before every step, to the first number that sampler.enumerate(loader) gives"
            )

    def note_replaced(self, before: Any, params: Sequence[Any] | None) -> None:
        """Note that an index has replaced another that no step had used, while parameters have gradients.

        Without gradients, or with nothing but zeros, a batch was merely left out. Tensors on a device are not compared,
        because reading them would wait.

        Args:
            before: the index that was replaced; None if there was none.
            params: the optimizer's parameters; None if it has no list of its own.
        """
        different = isinstance(before, int) and isinstance(self.next, int) and before != self.next
        if different and not self._warned and any(map(_has_gradient, params or ())):
            self.mixed = (before, self.next)

    def warn_of_mixture(self) -> None:
        """Warn, once, that gradients were accumulated under several indices.

        This comes before a step rather than after it, because a filter may turn the warning into an error.
        """
        mixed, self.mixed = self.mixed, None
        if self._warned:
            return
        self._warned = True
        warn(
            f"batch_index: received {mixed[0]} and then {mixed[1]} before one step, with gradients in the parameters: "
            f"slot {mixed[1]} stores a mixture of several batches. Expected one index for all gradients that are "
            "accumulated for a step: give a paddle_asgd.FixedBatchSampler the whole group as its batch_size, and split "
            "each batch that it gives; batch_num is then the number of groups.",
            SlotMismatchWarning,
        )


def _has_gradient(param: Any) -> bool:
    """Whether a parameter has a gradient other than the zeros that ``clear_grad()`` leaves."""
    grad = None if param.stop_gradient else param.grad
    return grad is not None and (grad.is_selected_rows() or bool(grad.astype("bool").any()))


def clock_length(n: int) -> int:
    """Length of a clock that knows which slots have been seen: the steps, the distinct slots, and one bit for each slot
    in words of 64.

    Args:
        n: the number of slots.

    Examples:
        >>> clock_length(64), clock_length(65)
        (3, 4)
    """
    return 2 + (n + 63) // 64


def grown_clock(clock: Any, n: int) -> np.ndarray:
    """A clock that knows which slots have been seen, made from the clock of a fixed cycle, which has seen the first
    min(m, n).

    Args:
        clock: the clock of a fixed cycle, int64 ``[1]``.
        n: the number of slots.

    Returns:
        An int64 array ``[clock_length(n)]``.

    Examples:
        >>> grown_clock(2, 5).tolist()
        [2, 2, 3]
    """
    steps = int(np.asarray(clock).reshape(-1)[0])
    seen = min(steps, n)
    bits = np.zeros(64 * (clock_length(n) - 2), dtype=np.uint8)
    bits[:seen] = 1
    words = np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64).view(np.int64)
    return np.concatenate([np.array([steps, seen], dtype=np.int64), words])


def check_clock(clock: np.ndarray, n: int) -> str | None:
    """Say what is wrong with a clock that knows which slots have been seen; None if nothing is.

    Args:
        clock: an int64 array ``[clock_length(n)]``.
        n: the number of slots.

    Examples:
        >>> check_clock(np.array([1, 2, 0b11]), 5)
        'has 1 steps and 2 distinct slots'
    """
    bits = np.unpackbits(clock[2:].astype("<i8").view(np.uint8), bitorder="little")
    if int(bits.sum()) != clock[1] or bits[n:].any():
        return f"has {clock[1]} distinct slots and {int(bits.sum())} marks, {int(bits[n:].sum())} of them out of range"
    if clock[0] < clock[1]:
        return f"has {clock[0]} steps and {clock[1]} distinct slots"
    return None


def normalised_weights(value: Any, n: int, argument: str = "batch_weights") -> np.ndarray | None:
    """Check batches' weights and scale them to a mean of 1.

    Args:
        value: ``n`` positive numbers in a list, a tuple, an array or a tensor; None if all batches weigh the same.
        n: the number of batches.
        argument: the name with which an error begins.

    Returns:
        A float64 array ``[n]``; None if all weigh the same.

    Raises:
        TypeError: the value is of another kind.
        ValueError: there are more or fewer than ``n`` numbers, one is not positive, or they differ too much.

    Examples:
        >>> normalised_weights([3, 3, 2, 4], 4).tolist()
        [1.0, 1.0, 0.6666666666666666, 1.3333333333333333]
        >>> normalised_weights([7, 7], 2) is None
        True
    """
    if value is None:
        return None
    received = value.numpy() if is_tensor(value) and isinstance(value, paddle.Tensor) else value
    if is_tensor(received) or isinstance(received, str) or not isinstance(received, (Sequence, np.ndarray)):
        raise TypeError(f"{argument}: received {shown(value)}, expected a list of {n} positive numbers")
    try:
        weights = np.array(received, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: received {shown(value)}, expected a list of {n} positive numbers") from None
    if weights.shape != (n,):
        raise ValueError(
            f"{argument}: received {' x '.join(map(str, weights.shape))} numbers, expected {n}, one for each of "
            "batch_num batches"
        )
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
    if len(wrong):
        raise ValueError(f"{argument}[{wrong[0]}]: received {weights[wrong[0]]}, expected a positive number")
    if (weights == weights[0]).all():
        return None
    weights = weights / weights.max()
    if weights.min() < SMALLEST_WEIGHT:
        raise ValueError(
            f"{argument}: received numbers whose smallest is {weights.min():.1g} times the largest, expected at "
            f"least {SMALLEST_WEIGHT:g} times, which float32 can hold; leave out batches that do not count"
        )
    return weights * (n / weights.sum())


def check_same_weights(loaded: Any, own: np.ndarray | None, n: int) -> None:
    """Refuse a checkpoint that was made with other weights, with which its ``d`` was summed.

    Args:
        loaded: the weights in the checkpoint; None if it has none.
        own: the optimizer's, of mean 1; None if it has none.
        n: the number of batches.

    Raises:
        ValueError: they are not the same, or those of the checkpoint are damaged.
    """
    try:
        received = normalised_weights(loaded, n, "the checkpoint's batch_weights")
    except (TypeError, ValueError) as error:
        refuse_state(str(error))
    same = received is own if received is None or own is None else np.allclose(received, own, rtol=1e-12, atol=0)
    if same:
        return
    kinds = ["none" if weights is None else "some" for weights in (received, own)]
    difference = "others" if kinds == ["some", "some"] else f"{kinds[0]}, and the optimizer {kinds[1]}"
    refuse_state(
        f"the checkpoint was made with batch_weights: {difference}; expected those of the optimizer, with which d is "
        "summed"
    )


def static_float64(values: np.ndarray) -> Any:
    """A float64 constant of a static graph.

    The format before PIR keeps 24 bits of a number, so the constant is summed there from three pieces of 24 bits.

    Args:
        values: a float64 array.
    """
    if in_pir_mode():
        return paddle.assign(values)
    total, rest = None, values
    for _ in range(3):
        piece = rest.astype(np.float32)
        rest = rest - piece
        constant = paddle.assign(piece).astype("float64")
        total = constant if total is None else total + constant
    return total
