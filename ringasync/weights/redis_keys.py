"""Names of the keys that carry weights; the same prefix and hash tag as the broker's."""

from __future__ import annotations

from ringasync.broker.keys import Keys


class WeightKeys:
    """Key names of one run's weights. ``name`` is ``manifest.version_name``."""

    def __init__(self, run: str) -> None:
        self.versions = Keys(run).prefix + "w"
        """Sorted set of version names, scored by policy version."""

    def index(self, name: str) -> str:
        """Hash: shard name -> number of chunks; the empty field holds a digest of all shards."""
        return f"{self.versions}:{name}"

    def chunk(self, name: str, shard: str, index: int) -> str:
        """One chunk of a shard."""
        return f"{self.versions}:{name}:{shard}:{index}"

    def pins(self, name: str) -> str:
        """Sorted set of readers, scored by expiry in ms of Redis's clock."""
        return f"{self.versions}:{name}:pins"
