"""Train engines behind one protocol, see ``base``."""
