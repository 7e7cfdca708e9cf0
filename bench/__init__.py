"""Benchmarks: the dispatcher beside what a user would pick instead, and beside the ceiling."""
