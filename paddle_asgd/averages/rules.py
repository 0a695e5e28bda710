# SPDX-License-Identifier: Apache-2.0
"""The rules of averaging: how much of the average is kept at update t = 1, 2, ... Must not know what is averaged.

A rule is any callable from t to the decay in [0, 1]. Ours know the weight 1 - decay as well, more precisely than a
subtraction would give it: with a decay near 1 the subtraction leaves few correct digits.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Callable

from ..arguments import check_flag, check_int, check_positive, shown

#: sigma_rel at gamma = (sqrt(5) - 3) / 2, where the width of a power function is largest: golden ratio ** -2.5.
_WIDEST = ((1 + math.sqrt(5)) / 2) ** -2.5
_WARMUPS = (None, "inverse", "ratio")


class Rule:
    """What our rules have in common. Immutable, and without a memory: ``weight(t)`` is the same after a resume."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def weight(self, t: int) -> float:
        """Return the share of the present weights in the average after update t = 1, 2, ...: 1 - decay."""
        raise NotImplementedError

    def __call__(self, t: int) -> float:
        """Return the decay of update t = 1, 2, ...: the share of the old average."""
        return 1.0 - self.weight(t)

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's name and its arguments as plain values, for a checkpoint to say what made an average."""
        return {"rule": type(self).__name__, **self._settings}

    def __eq__(self, other: object) -> bool:
        return self.state_dict() == other.state_dict() if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.state_dict().items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._settings.items())})"


class ema(Rule):  # noqa: N801, called as a function of its settings
    r"""The exponential moving average, with or without a warm-up of its decay.

    .. math::

        \bar{x}_t = \bar{x}_{t-1} + (1 - d_t) (x_t - \bar{x}_{t-1}), \quad d_t = d

    With ``warmup="inverse"``, :math:`d_1 = 0` and then :math:`d_t` is :math:`1 - (1 + (t - 1) / \text{inv\_gamma})
    ^{-\text{power}}`, at least ``min_decay`` and at most d. With ``warmup="ratio"``, :math:`d_t = \min(d, t / (t +
    9))`. With ``debias=True`` the average starts at zero and is divided by :math:`1 - d_1 d_2 \cdots d_t`, so the
    weights before the first update have no part in it. That is the same as a weight of :math:`(1 - d_t) / (1 - d_1
    \cdots d_t)`, which is what ``weight(t)`` then gives, so the average needs no division afterwards.

    Args:
        decay: the share d of the old average, from 0 to 1. 0.999 averages over about 1,000 updates.
        warmup: None, "inverse" or "ratio". Early averages then forget the first weights sooner.
        inv_gamma: the time scale of ``warmup="inverse"`` in updates, above 0.
        power: the exponent of ``warmup="inverse"``, above 0. With 2/3 the decay reaches 0.999 at update 31,623, with
            3/4 at update 10,000; with 1 the average is the mean of all weights until d is reached.
        min_decay: the least decay of ``warmup="inverse"`` from the second update on, at most d.
        debias: whether the average starts at zero and is corrected for it.
        half_life: in place of ``decay``: the number of updates after which a weight counts half, above 0.

    Raises:
        TypeError: an argument is of the wrong type, or neither ``decay`` nor ``half_life`` is given.
        ValueError: an argument is out of range, both ``decay`` and ``half_life`` are given, or an option would have no
            effect with the others.

    Examples:
        >>> from paddle_asgd import ema
        >>> rule = ema(0.999, warmup="ratio")
        >>> rule(11), rule(91), rule(100_000)
        (0.55, 0.91, 0.999)
        >>> rule
        ema(0.999, warmup='ratio')

    Sources: the inverse warm-up is that of K. Crowson, as in timm and diffusers; the ratio is that of
    ``tf.train.ExponentialMovingAverage``; the correction is that of D. P. Kingma, J. Ba, "Adam", section 3.
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        warmup: str | None = None,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        debias: bool = False,
        half_life: float | None = None,
    ) -> None:
        if decay is None and half_life is None:
            raise TypeError("decay: received None, expected a number from 0 to 1; or pass half_life=...")
        if decay is not None and half_life is not None:
            raise ValueError(
                f"half_life: received {shown(half_life)} beside decay={decay!r}, expected one of the two; leave one out"
            )
        if not (warmup is None or isinstance(warmup, str)) or warmup not in _WARMUPS:
            raise (ValueError if isinstance(warmup, str) else TypeError)(
                f"warmup: received {shown(warmup)}, expected None, 'inverse' or 'ratio'"
            )
        if half_life is None:
            decay = check_share("decay", decay)
            #: 1 - d, and log(d)
            self._weight, self._log = 1.0 - decay, math.log(decay) if decay > 0 else -math.inf
        else:
            half_life = check_positive("half_life", half_life)
            self._log = -math.log(2) / half_life
            self._weight = -math.expm1(self._log)
        super().__init__(
            decay=decay,
            warmup=warmup,
            inv_gamma=check_positive("inv_gamma", inv_gamma),
            power=check_positive("power", power),
            min_decay=check_share("min_decay", min_decay),
            debias=check_flag("debias", debias),
            half_life=half_life,
        )
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        given, defaults = self._settings, ema.__init__.__kwdefaults__
        if given["warmup"] != "inverse":
            for name in ("inv_gamma", "power", "min_decay"):
                if given[name] != defaults[name]:
                    raise ValueError(
                        f"{name}: received {given[name]!r} with warmup={given['warmup']!r}, expected nothing, for it "
                        "has no effect there; pass warmup='inverse' too"
                    )
        if 1.0 - given["min_decay"] < self._weight:
            raise ValueError(
                f"min_decay: received {given['min_decay']!r}, expected at most the decay, {1.0 - self._weight!r}"
            )
        if given["debias"] and given["warmup"] == "inverse":
            raise ValueError(
                "debias: received True with warmup='inverse', expected False: the first decay is 0, so there is no bias"
            )
        if given["debias"] and given["warmup"] is None and self._weight == 0:
            raise ValueError(
                "debias: received True with decay=1, expected a decay below 1: the average would stay zero"
            )

    def weight(self, t: int) -> float:
        """Return the share of the present weights in the average after update t = 1, 2, ..., corrected for the bias."""
        t = check_int("t", t, 1)
        warmup = self._settings["warmup"]
        if warmup == "inverse":
            return self._inverse(t - 1)
        weight = self._weight if warmup is None else max(self._weight, 9.0 / (t + 9))
        if self._settings["debias"]:
            # Exactly 1 at first and never more, however it rounds: the average must stay within what it saw.
            return 1.0 if t == 1 else min(weight / self._debt(t), 1.0)
        return weight

    def _inverse(self, s: int) -> float:
        if s == 0:
            return 1.0
        given = self._settings
        weight = (1.0 + s / given["inv_gamma"]) ** -given["power"]
        return min(max(weight, self._weight), 1.0 - given["min_decay"])

    def _debt(self, t: int) -> float:
        """1 - d_1 d_2 ... d_t, in closed form: a resumed average needs no product of its past."""
        if self._settings["warmup"] is None:
            return -math.expm1(t * self._log)
        # i / (i + 9) for i = 1, ..., ramp, whose product is a binomial coefficient's reciprocal, and then d.
        ramp = t if t * self._weight <= 9.0 * (1.0 - self._weight) else int(9.0 * (1.0 - self._weight) / self._weight)
        return 1.0 - (1 / math.comb(ramp + 9, 9)) * math.exp(((t - ramp) * self._log) if t > ramp else 0.0)

    def __repr__(self) -> str:
        defaults = ema.__init__.__kwdefaults__
        words = [f"{name}={value!r}" for name, value in self._settings.items() if value != defaults.get(name, value)]
        return f"ema({', '.join(([] if self._settings['decay'] is None else [repr(self._settings['decay'])]) + words)})"


class swa(Rule):  # noqa: N801, called as a function of its settings
    r"""The mean of the weights after all updates: stochastic weight averaging.

    .. math::

        d_t = 1 - 1 / t

    The weights before the first update have no part in it.

    Raises:
        TypeError: it is called with an argument.

    Examples:
        >>> from paddle_asgd import swa
        >>> [swa()(t) for t in (1, 2, 4)]
        [0.0, 0.5, 0.75]

    Source: P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018.
    """

    def __init__(self) -> None:
        super().__init__()

    def weight(self, t: int) -> float:
        """Return the share of the present weights in the average after update t = 1, 2, ...: 1 / t."""
        return 1.0 / check_int("t", t, 1)


class power_ema(Rule):  # noqa: N801, called as a function of its settings
    r"""An average over a fixed fraction of the training so far: its weights rise with a power of time.

    .. math::

        d_t = (1 - 1 / t)^{\gamma + 1}, \quad \sigma_{rel}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}

    so the share of :math:`x_i` in the average after update t is proportional to :math:`i^\gamma` for large i. The
    weights before the first update have no part in it. An average that is updated once in k steps has the same width:
    :math:`(1 - k / (k t))^{\gamma + 1}` depends on the number of the update alone.

    Args:
        sigma_rel: the width, as the standard deviation of the times that enter the average over the time of training:
            above 0 and at most 0.30028, beyond which no power function reaches. 0.05 to 0.15 are usual; the mean of
            all weights has 0.2887.

    Attributes:
        gamma: the exponent; 6.94 for ``sigma_rel=0.1``.

    Raises:
        TypeError: ``sigma_rel`` is not a number.
        ValueError: ``sigma_rel`` is out of range.

    Examples:
        >>> from paddle_asgd import power_ema
        >>> rule = power_ema(0.1)
        >>> round(rule.gamma, 5), round(rule(1000), 6)
        (6.9372, 0.99209)

    Source: T. Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024,
    section 3 and appendix C.
    """

    def __init__(self, sigma_rel: float) -> None:
        super().__init__(sigma_rel=check_width("sigma_rel", sigma_rel))
        self._exponent = exponent(self._settings["sigma_rel"])

    @property
    def gamma(self) -> float:
        return self._exponent

    def weight(self, t: int) -> float:
        """Return the share of the present weights in the average after update t = 1, 2, ..."""
        if check_int("t", t, 1) == 1:
            return 1.0
        return -math.expm1((self._exponent + 1.0) * math.log1p(-1.0 / t))


def exponent(sigma_rel: float) -> float:
    """The gamma of a width: with u = gamma + 2, the largest root of u^3 + u^2 + (1 - u) / sigma_rel^2."""
    # Newton's method for v = u * sigma_rel. It falls from 1 to the root without passing it, for the cubic is convex.
    s, v = sigma_rel, 1.0
    while True:
        slope = (3.0 * v + 2.0 * s) * v - 1.0
        lower = v - (((v + s) * v - 1.0) * v + s) / slope if slope > 0 else v
        if not lower < v:
            return v / s - 2.0
        v = lower


def check_width(argument: str, value: Any) -> float:
    """A sigma_rel that a power function has."""
    number = check_positive(argument, value)
    if number > _WIDEST:
        raise ValueError(
            f"{argument}: received {shown(value)}, expected at most {_WIDEST:.5f}, the largest width of a power "
            "function; swa() is the mean of all weights"
        )
    return number


def check_share(argument: str, value: Any) -> float:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: received {shown(value)}, expected a number from 0 to 1")
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{argument}: received {value!r}, expected a number from 0 to 1")
    return number


def check_rule(argument: str, value: Any) -> Callable[[int], float]:
    """One of our rules, or a callable of the update's number."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"{argument}: received {shown(value)}, expected a rule such as ema(0.999) or swa(), or a callable that "
            "takes the number of the update and returns the decay"
        )
    return value


def weight_of(rule: Callable[[int], float], t: int) -> float:
    """1 - decay of any rule at update t = 1, 2, ..., and a refusal of what is no decay."""
    if isinstance(rule, Rule):
        return rule.weight(t)
    return 1.0 - check_share(f"decay of update {t}", rule(t))


def state_of(rule: Callable[[int], float]) -> dict[str, Any] | None:
    """What a checkpoint says of a rule; None of one of the user's own, which no checkpoint can hold."""
    return rule.state_dict() if isinstance(rule, Rule) else None
