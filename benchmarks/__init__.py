# SPDX-License-Identifier: Apache-2.0
"""Timings of one optimizer step beside what a user would pick instead. Must assert nothing about time."""
