"""Typed records that cross process borders, and their codecs. No Redis, no asyncio, no torch."""
