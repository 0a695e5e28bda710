# SPDX-License-Identifier: Apache-2.0
"""The stochastic average gradient: the optimizer, its batches, and the watch over them. Must not hold code."""
