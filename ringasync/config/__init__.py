"""Run configuration: schema, loading and what follows from it."""
