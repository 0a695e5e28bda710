# SPDX-License-Identifier: Apache-2.0
"""Makes several changes as one, which an interrupt cannot divide. Must not know what is changed.

Python handles a signal, such as Ctrl-C, between two of its own instructions. While C code runs there is none, so a
sequence of C calls that C code makes is taken whole or not at all.
"""

from __future__ import annotations

import operator
from collections import deque
from typing import Any, Callable

_make = operator.methodcaller("__call__")


def uninterrupted(*calls: Callable[[], Any]) -> None:
    """Make calls one after another with no instruction of Python between them; an error ends the sequence.

    Args:
        calls: functions of C without arguments: ``functools.partial`` of one, or a method of a list or a dict. A
            function of Python is called as well, but an interrupt can come within it.
    """
    deque(map(_make, calls), maxlen=0)
