"""Whole runs, from options to a report."""
