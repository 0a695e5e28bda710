"""Timings of one optimizer step beside what a user would pick instead. Must assert nothing about time."""
