"""Inference engines behind one protocol; each heavy library is imported by its own module only."""
