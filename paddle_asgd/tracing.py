# SPDX-License-Identifier: Apache-2.0
"""Keeps the default mode of ``paddle.jit.to_static`` out of this package: a traced function takes its steps in Python.

That tracer simulates the bytecode of every function that is called. It passes over the files of Paddle's own
optimizers, and this module makes it pass over ours. Tracing with ``full_graph=True`` is another mechanism (fused.py),
and must not be handled here.
"""

from __future__ import annotations

import os

import paddle

try:
    from paddle.jit.sot.psdb import fallback as leave_trace
except ImportError:  # a Paddle without this tracer

    def leave_trace() -> None:
        """Make the tracer run the function that calls this in Python; nothing happens outside of a trace."""


def _exempt(folder: str) -> None:
    """Have the tracer pass over all functions that are defined in the files of a folder.

    Args:
        folder: an absolute path. A path with characters outside ASCII is left out, because Paddle indexes an array with
            each char of it, which is negative there; steps are then traced like any other code.
    """
    pass_over = getattr(paddle.base.core, "eval_frame_skip_file_prefix", None)
    if pass_over is not None and folder.isascii():
        pass_over((folder + os.sep,))


_exempt(os.path.dirname(os.path.abspath(__file__)))
