# SPDX-License-Identifier: Apache-2.0
"""Keeps the default mode of ``paddle.jit.to_static`` out of this package: a traced function takes its steps in Python.

That tracer simulates the bytecode of every function that is called. Paddle's own optimizers are exempt because their
files are. Must not be needed anywhere else: tracing with ``full_graph=True`` comes by another way (fused.py).
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
    """Have the tracer pass over the functions of a folder's files."""
    pass_over = getattr(paddle.base.core, "eval_frame_skip_file_prefix", None)
    # Paddle indexes an array with each char of a path, which is negative outside of ASCII.
    if pass_over is not None and folder.isascii():
        pass_over((folder + os.sep,))


_exempt(os.path.dirname(os.path.abspath(__file__)))
