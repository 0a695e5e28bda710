# SPDX-License-Identifier: Apache-2.0
"""Makes several changes as one, which an interrupt cannot divide. Must not know what is changed.

Python handles a signal such as Ctrl-C between two of its own instructions. No such instruction runs while C code does,
so a sequence of C calls that is made from C is taken as a whole or not at all.
"""

from __future__ import annotations

import operator
from collections import deque
from typing import Any, Callable

_make = operator.methodcaller("__call__")


def uninterrupted(*calls: Callable[[], Any]) -> None:
    """Make calls one after another with no Python instruction between them; an error ends the sequence.

    Args:
        calls: C functions without arguments: ``functools.partial`` of one, or a method of a list or a dict. A Python
            function is called as well, but an interrupt can come within it.

    Examples:
        >>> from functools import partial
        >>> taken, waiting = [], {"batch": 3}
        >>> uninterrupted(partial(taken.append, 3), waiting.clear)
        >>> taken, waiting
        ([3], {})
    """
    deque(map(_make, calls), maxlen=0)
