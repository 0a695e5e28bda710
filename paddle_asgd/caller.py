# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the user's line, however many calls of Paddle and of this package lie between."""

from __future__ import annotations

import sys
import warnings

_PASSED_OVER = ("paddle", "paddle_asgd", "decorator", "importlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest caller that is neither Paddle's nor this package's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
