# SPDX-License-Identifier: Apache-2.0
"""Averages of weights: the rules, the models and optimizers that keep them, and what goes with them. No code here."""
