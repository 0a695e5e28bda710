# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the user's line, however many calls of Paddle and of this package lie between.

Must not decide what to warn of.
"""

from __future__ import annotations

import sys
import warnings

#: Packages whose lines are not the user's. Paddle's decorators call through ``decorator``, and a warning that is given
#: while this package is imported passes through ``importlib``.
_PASSED_OVER = ("paddle", "paddle_asgd", "decorator", "importlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest caller that belongs neither to Paddle nor to this package.

    Args:
        message: the text of the warning.
        category: its class, by which users filter it.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
