# SPDX-License-Identifier: Apache-2.0
"""Bit checks and timings of the CUDA kernel on a GPU, without Paddle. Must assert nothing about time."""
