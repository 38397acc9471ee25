"""Seeing what a run does: logs, the live view in a terminal, the report."""
