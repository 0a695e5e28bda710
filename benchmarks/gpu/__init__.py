"""Bit checks and timings of the CUDA kernel on a GPU, without Paddle. Must assert nothing about time."""
