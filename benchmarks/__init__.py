"""Measurements of ringasync; see README.md in this folder."""
