"""The learner: token-budgeted batches, IcePop, journal, checkpoint, weight publication."""
