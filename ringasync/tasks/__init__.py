"""Where prompts come from: procedural generators, local files and hub data, mixed by weight.

Everything is a pure function of (seed, index), so that the position in the data is one integer.
Heavy libraries are imported inside functions.
"""
