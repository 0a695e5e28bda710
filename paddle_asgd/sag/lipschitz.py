# SPDX-License-Identifier: Apache-2.0
"""LipschitzSearch: finds the learning rate from the losses, by the method's own line search.

It sets an optimizer's learning rate and calls its step(). Must not know how a step is taken.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Callable

import paddle
from paddle.base.framework import in_dygraph_mode
from paddle.regularizer import L2Decay

from ..arguments import check_positive, dtype_name, is_tensor, shown
from ..caller import warn
from ..distributed_tensors import is_distributed
from ..fused import FusedOptimizer
from ..gradients import dense
from ..options import Options
from ..sharding import gathered, replicas_group
from ..state import is_16_bit
from .order import ENOUGH_THETA, RESHUFFLED_LIMIT, OrderSeen, cyclic_limit

#: |g|^2 up to which no comparison is made, since rounding would decide it. The number is the paper's.
_SMALLEST_GRADIENT = 1e-8
#: The least estimate. It keeps the learning rate finite in float32 if all gradients are 0 and L is never doubled.
_SMALLEST = 2.0**-100
#: How often L is doubled in one step, enough to reach 2^100 from the least estimate. A loss that has not decreased by
#: then has another fault.
_DOUBLINGS = 200
#: After this many doublings the closure is called again where the step began. In the long run L is doubled once in a
#: pass if all is right, and about once in a step if the loss depends on chance.
_DOUBLINGS_TO_CHECK = 10
#: How far the squared gradients of two ranks may be apart, relative to them: each rank sums its own.
_SAME_GRADIENT = 1e-6
_AUTO = "auto"
#: The factors that "auto" stands for, the second with fewer than _FEW batches. L is halved within a pass, in which each
#: batch is tried only once, so the paper's factor of 1 overshoots with large batches, and 0.7 does with few batches.
_FACTOR, _FACTOR_OF_FEW, _FEW = 0.7, 0.5, 20
#: The most that "auto" times theta may be: the larger theta, the more the spread of the stored gradients enters a step.
_FACTOR_TIMES_THETA = 0.25
#: How much rounding may change a loss, relative to it: four times the dtype's epsilon. With bfloat16 parameters a small
#: network's L climbed to 8; to 250 with one epsilon instead of four, and to 10^7 with the value for float32.
_ROUNDING = {"float16": 2.0**-8, "bfloat16": 2.0**-5, "float32": 2.0**-21, "float64": 2.0**-50}


class LipschitzSearch:
    r"""Finds the learning rate while training: estimates the Lipschitz constant of the gradient, batch by batch.

    .. math::

        & \text{while } \|g\|^2 > 10^{-8} \text{ and } f_i(x - g / L) > f_i(x) - \|g\|^2 / (2 L): \quad
            L \leftarrow 2 L \\
        & \text{learning\_rate} = \text{factor} / (L + \text{weight\_decay}),
            \quad \text{one step of the optimizer}, \quad L \leftarrow 2^{-1/n} L

    with :math:`f_i` the loss of the present batch, :math:`g` its gradient at the parameters :math:`x`, and :math:`n`
    the optimizer's ``batch_num``. Most steps cost one more forward pass, and each comparison waits for the loss.

    With ``theta=0.3`` and batches that are reshuffled or drawn with replacement there is nothing to tune. The paper's
    rule assumes replacement. Without theta, a reshuffled order allows only about 1 / n of these learning rates, so the
    search warns once it has seen two such passes. Without a ``batch_index``, batches come in a fixed order; the default
    ``factor`` is then at most half of what is stable in that order, which theta raises by little.

    ``closure`` must give the same loss for the same parameters. To find out, it is called once more where the step
    began after every tenth doubling of L. Dropout has to be off; batch normalisation works, but its running statistics
    include the points that are tried. No decrease is demanded below the rounding of the loss's dtype, or of a
    parameter's if that is coarser, so the loss should be float32 or float64; what ``auto_cast`` rounds within
    ``closure`` cannot be seen and may drive L up. ``GradScaler`` cannot be used.

    Under ``paddle.DataParallel`` the ranks search together, by the mean of their losses, and find the same learning
    rate: every rank must call ``step``, with the same index. If a batch has unequal parts, ``closure`` returns
    ``sampler.part_loss(index, loss)``. An optimizer whose parameters fleet's sharding has divided is refused.

    Args:
        optimizer: an optimizer of this package in dygraph mode, whose learning rate is a number. Its learning rate is
            overwritten at every step, and groups' multipliers apply to it. The weight_decay of the formula is the
            largest of all parameters, numbers and ``L2Decay`` alike; the search itself uses only the loss.
        initial: the first estimate of L, above 0, in units of the loss over those of a parameter squared. An estimate
            that is far too large costs a pass for every factor of 2, one that is too small costs a few forward passes.
        factor: the learning rate times L, a number above 0. The paper's is 1; with few or large batches it
            overshoots. "auto" is 0.7, or 0.5 with fewer than 20 batches, and at most ``0.25 / theta``; without a
            ``batch_index`` also at most half of what a fixed order allows, ``2.46 / n`` without theta and ``6.6 / n``
            with 0.3.

    Raises:
        TypeError: an argument is of the wrong type, or the learning rate is a scheduler or a tensor.
        ValueError: an argument is out of range, or the optimizer's parameters are divided among ranks or on a mesh.
        RuntimeError: Paddle is in static graph mode, where no loss has a value yet.

    Examples:
        >>> import paddle
        >>> from paddle_asgd import ASGD, LipschitzSearch
        >>> linear = paddle.nn.Linear(4, 1)
        >>> batches = [paddle.randn([8, 4]) for _ in range(3)]
        >>> optimizer = ASGD(batch_num=3, parameters=linear.parameters(), theta=0.3)
        >>> search = LipschitzSearch(optimizer)
        >>> for _ in range(2):
        ...     for optimizer.batch_index, batch in enumerate(batches):
        ...         loss = search.step(lambda: linear(batch).square().mean())
        >>> optimizer.get_lr() > 0
        True

    Source: M. Schmidt, N. Le Roux, F. Bach, "Minimizing Finite Sums with the Stochastic Average Gradient", Mathematical
    Programming 162 (2017), section 4.6. The factor is from measurements with batches of 1 to 64 samples.
    """

    def __init__(self, optimizer: FusedOptimizer, initial: float = 1.0, factor: float | str = "auto") -> None:
        if not isinstance(optimizer, FusedOptimizer) or not hasattr(optimizer, "batch_num"):
            raise TypeError(
                f"optimizer: received {shown(optimizer)}, expected one of this package with a batch_num, such as ASGD"
            )
        self._optimizer = optimizer
        self._lipschitz = check_positive("initial", initial)
        self._factor = None if isinstance(factor, str) and factor == _AUTO else check_positive("factor", factor)
        self._order = OrderSeen(optimizer.batch_num)
        #: how often L was doubled since the closure was last called twice at the same parameters
        self._doublings = 0
        self._check_optimizer()

    @property
    def lipschitz(self) -> float:
        """The estimate L with which the next step begins, a float above 0. The last step's learning rate is
        ``optimizer.get_lr()``.
        """
        return self._lipschitz

    def step(self, closure: Callable[[], Any]) -> Any:
        """Compute a batch's loss and gradients, search, set the learning rate, update, and clear the gradients.

        Args:
            closure: computes the present batch's loss from the present parameters and returns it, a tensor of one
                element. It is called once with gradients and, to search, several times without. Unlike the closure of
                ``ASGD.step`` it must not call ``backward()``, which this method does. Gradients that were there before
                the call are dropped.

        Returns:
            The loss before the update, detached.

        Raises:
            TypeError: ``closure`` cannot be called, or returns anything but one floating-point number.
            ValueError: the loss or a gradient is not finite, the loss depends on no parameter or on more than the
                parameters (dropout), ``closure`` called ``backward()``, or the gradients of the ranks differ.
            RuntimeError: the loss never decreases along its own gradient.

        Whatever is raised, by ``closure`` as well, the parameters are what they were, and no step has been taken. The
        only exception is a warning that a filter turns into an error, which comes after the step.
        """
        self._check_optimizer()
        if not callable(closure):
            raise TypeError(f"closure: received {shown(closure)}, expected a function that computes the loss")
        optimizer = self._optimizer
        had_gradient = [param for param, grad in self._all_gradients() if grad is not None]
        optimizer.clear_grad(set_to_zero=False)
        try:
            with paddle.enable_grad():
                loss = _check_loss(closure())
                self._check_no_gradient()
                if loss.stop_gradient:
                    raise ValueError(
                        "loss: received one that no gradient flows from, expected one computed from parameters"
                    )
                loss.backward()
            lipschitz = self._search(closure, loss)
            _fill_with_zeros(had_gradient)
            index = optimizer.batch_index
            optimizer.set_lr(self._factor_of(index) / (lipschitz + self._largest_decay()))
            optimizer.step()
        finally:
            _fill_with_zeros(had_gradient)
            optimizer.clear_grad()
        self._lipschitz = max(lipschitz * 2.0 ** (-1.0 / optimizer.batch_num), _SMALLEST)
        if index is not None:
            self._look_at_order(int(index))
        return loss.detach()

    def state_dict(self) -> dict[str, float]:
        """What a resumed training needs besides the optimizer's own state: ``{"lipschitz": L}``."""
        return {"lipschitz": self._lipschitz}

    def set_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue with the estimate that ``state_dict`` gave.

        Args:
            state_dict: a dict with the one key ``lipschitz``.

        Raises:
            TypeError: it is not a dict, or L is not a number.
            ValueError: L is missing, not above 0 or not finite, or there are other entries; nothing has been loaded.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"set_state_dict: received {shown(state_dict)}, expected a dict")
        if list(state_dict) != ["lipschitz"]:
            raise ValueError(f"set_state_dict: received the keys {list(state_dict)}, expected 'lipschitz' alone")
        self._lipschitz = check_positive("set_state_dict: lipschitz", state_dict["lipschitz"])

    # ---- What the order of the batches allows -----------------------------------------------------------------------

    def _factor_of(self, index: Any) -> float:
        """The learning rate times L, chosen by theta, the number of batches and their order if ``factor`` is "auto".

        Args:
            index: the batch index of this step; None if batches come in a fixed order.
        """
        if self._factor is not None:
            return self._factor
        theta, n = self._theta(), self._optimizer.batch_num
        chosen = _FACTOR if n >= _FEW else _FACTOR_OF_FEW
        if theta > 0:
            chosen = min(chosen, _FACTOR_TIMES_THETA / theta)
        return chosen if index is not None else min(chosen, cyclic_limit(theta) / 2 / n)

    def _theta(self) -> float:
        """Theta as far as it is known: 0 for None, which means 1 / seen, and for a callable, which may return 0 at any
        step.
        """
        theta = getattr(self._optimizer, "theta", None)
        return theta if isinstance(theta, numbers.Real) else 0.0

    def _look_at_order(self, index: int) -> None:
        """Warn if the order of the batches sets a limit that a search on single batches cannot see."""
        order, theta, n = self._order.add(index), self._theta(), self._optimizer.batch_num
        # Which values a schedule of theta will take is not known.
        unlimited = order is None or callable(getattr(self._optimizer, "theta", None))
        limit = math.inf if unlimited else cyclic_limit(theta)
        if order == "reshuffle" and not unlimited:
            limit = math.inf if theta >= ENOUGH_THETA else RESHUFFLED_LIMIT
        if self._factor_of(index) * n <= limit:
            return
        remedies = {
            "reshuffle": "pass theta=0.3 to the optimizer",
            "sequential": 'take order="reshuffle" of FixedBatchSampler, and pass theta=0.3 to the optimizer',
        }
        came = {"reshuffle": "once in each of two passes", "sequential": "in the same order in two passes"}
        warn(
            f"LipschitzSearch: batches came {came[order]} with theta={getattr(self._optimizer, 'theta', None)}, where "
            f"learning_rate * batch_num times the largest curvature must stay below {limit:.3g}. A search over single "
            f"batches does not see that limit, and its learning rates may be {self._factor_of(index) * n / limit:.2g} "
            f"times too large; {remedies[order]}"
        )

    # ---- The search -------------------------------------------------------------------------------------------------

    @paddle.no_grad()
    def _search(self, closure: Callable[[], Any], loss: Any) -> float:
        """Double the estimate until this batch does not violate it, and return it. Leaves the parameters as they are.

        Args:
            closure: computes the loss of the batch.
            loss: the loss at the parameters as they are, whose gradients the parameters have.

        Raises:
            ValueError: the loss or a gradient is not finite, or the loss depends on chance.
            RuntimeError: the loss never decreases.
        """
        pairs = self._gradients()
        squared = paddle.add_n([paddle.sum(paddle.square(g.astype("float64"))) for _, g in pairs]).item()
        value, squared = _agreed(loss.item(), squared)
        if not math.isfinite(value) or not math.isfinite(squared):
            raise ValueError(
                f"loss: received {value} with a squared gradient of {squared}, expected finite numbers; no step has "
                "been taken"
            )
        if squared <= _SMALLEST_GRADIENT:
            return self._lipschitz
        # No decrease is demanded that rounding hides, or L would double until no step is left. The rounding of the
        # parameters counts, too, because the points that are tried are rounded to their dtype.
        rounding = abs(value) * max(_ROUNDING[dtype_name(tensor.dtype)] for tensor in (loss, *(p for p, _ in pairs)))
        lipschitz = self._lipschitz
        start = [param.detach().clone() for param, _ in pairs]
        try:
            for _ in range(_DOUBLINGS):
                for (param, grad), x in zip(pairs, start):
                    paddle.assign(_moved(x, grad, lipschitz), param)
                tried = _check_loss(closure())
                if tried is loss:
                    raise ValueError("closure: received the same tensor twice, expected the loss computed anew")
                tried = _mean(tried.item())
                if math.isfinite(tried) and tried <= value - squared / (2 * lipschitz) + rounding:
                    return lipschitz
                lipschitz *= 2
                self._doublings += 1
                if self._doublings == _DOUBLINGS_TO_CHECK:
                    self._doublings = 0
                    _put_back(pairs, start)
                    _check_same(_mean(_check_loss(closure()).item()), value, rounding)
        finally:
            _put_back(pairs, start)
        raise RuntimeError(
            f"closure: the loss does not decrease along its own gradient, not even by a step of 1 / {lipschitz:.1e}; "
            "expected a loss that depends on nothing but the present parameters"
        )

    def _gradients(self) -> list[tuple[Any, Any]]:
        """The parameters that have a gradient, each with it in the form in which the optimizer will see it."""
        pairs = [(p, dense(p, g)) for p, g in self._all_gradients() if g is not None]
        if not pairs:
            raise ValueError("loss: received one that no parameter of the optimizer has a gradient of")
        return pairs

    def _all_gradients(self) -> list[tuple[Any, Any]]:
        """The parameters that may have a gradient, each with its gradient or None."""
        return [(p, p.grad) for p in self._optimizer._parameter_list if not p.stop_gradient]

    def _check_no_gradient(self) -> None:
        """Refuse a closure that called ``backward()``: all gradients were dropped before it, so any that is there is
        its own.
        """
        if any(grad is not None for _, grad in self._all_gradients()):
            raise ValueError(
                "closure: it left gradients, so it called backward(); expected the loss alone: step() calls backward() "
                "itself"
            )

    def _largest_decay(self) -> float:
        """The largest weight decay of all parameters, which makes the learning rate the smallest that any of them would
        have alone.
        """
        of = self._optimizer._options.of
        return max(_curvature(of(param)) for param in self._optimizer._parameter_list if not param.stop_gradient)

    def _check_optimizer(self) -> None:
        """Refuse an optimizer or a mode that a search cannot work with. Every step checks again, since both may have
        been changed.
        """
        if not in_dygraph_mode():
            raise RuntimeError(
                "LipschitzSearch: received a call in static graph mode, expected dygraph; what comes next depends on "
                "the loss, which has no value while a graph is built"
            )
        self._optimizer._require_parameters()
        if self._optimizer.is_divided:
            raise ValueError(
                "optimizer: received one whose parameters a wrapper has divided among ranks, expected one that has all "
                "parameters, because the search needs the whole gradient; use paddle.DataParallel without sharding, or "
                "set the learning rate yourself"
            )
        if any(map(is_distributed, self._optimizer._parameter_list)):
            raise ValueError(
                "optimizer: received one whose parameters shard_tensor has put on a mesh, expected tensors of this "
                "process; use paddle.DataParallel, or set the learning rate yourself"
            )
        rate = self._optimizer._learning_rate
        if not isinstance(rate, numbers.Real):
            raise TypeError(
                f"optimizer: received one whose learning_rate is {shown(rate)}, expected a number, which the search "
                "overwrites"
            )


def _mean(loss: float) -> float:
    """The mean of a loss over the ranks of data parallelism, the same on each, so that all take the same branch."""
    losses = [row[0] for row in gathered([loss], replicas_group())]
    return sum(losses) / len(losses)


def _agreed(loss: float, squared: float) -> tuple[float, float]:
    """The mean of the loss over the ranks, and the squared gradient, which they must have in common.

    Raises:
        ValueError: the ranks have different gradients.
    """
    rows = gathered([loss, squared], replicas_group())
    losses, squares = zip(*rows)
    if max(squares) - min(squares) > _SAME_GRADIENT * max(squares):
        raise ValueError(
            f"gradient: received squared norms from {min(squares):.8g} to {max(squares):.8g} on {len(rows)} ranks, "
            "expected the same on all; wrap the model in paddle.DataParallel, which averages the gradients, and pass "
            "the same seed to every rank"
        )
    return sum(losses) / len(rows), squares[0]


def _moved(x: Any, grad: Any, lipschitz: float) -> Any:
    """``x - grad / lipschitz``. For 16-bit parameters it is computed in float32 and rounded once."""
    if is_16_bit(x):
        return (x.astype("float32") - grad.astype("float32") / lipschitz).astype(x.dtype)
    return x - grad / lipschitz


@paddle.no_grad()
def _fill_with_zeros(params: list[Any]) -> None:
    """Give zeros as the gradient to parameters that this batch did not reach, as ``clear_grad()`` would; they take a
    slot, too.
    """
    for param in params:
        if param.grad is None:
            param.grad = paddle.zeros_like(param)


def _put_back(pairs: list[tuple[Any, Any]], start: list[Any]) -> None:
    """Set the parameters to what they were before the search."""
    for (param, _), x in zip(pairs, start):
        paddle.assign(x, param)


def _check_same(again: float, loss: float, rounding: float) -> None:
    """Refuse a loss that depends on chance, with which L would double for ever and training end without a word.

    Args:
        again: the loss of a second call.
        loss: that of the first call, at the same parameters.
        rounding: how far the two may be apart.
    """
    if not abs(again - loss) <= rounding:
        raise ValueError(
            f"closure: gave {loss:.8g} and then {again:.8g} at the same parameters, expected the same loss; switch "
            "dropout off (model.eval())"
        )


def _curvature(options: Options) -> float:
    """What a parameter's weight decay adds to the largest curvature of the loss; 0 for an L1Decay."""
    if options.regularizer is not None:
        return float(options.regularizer._coeff) if isinstance(options.regularizer, L2Decay) else 0.0
    decay = options.weight_decay
    return decay.item() if is_tensor(decay) else decay


def _check_loss(loss: Any) -> Any:
    """Check that a closure returned a tensor of one floating-point number, and return it."""
    if not is_tensor(loss) or math.prod(loss.shape) != 1 or dtype_name(loss.dtype) not in _ROUNDING:
        raise TypeError(
            f"closure: received {shown(loss)} from it, expected the loss as a floating-point tensor of one element"
        )
    return loss
