"""ringasync: asynchronous actor-learner reinforcement learning for language models.

Importing this package loads neither torch nor vLLM; the roles that need them live in the
top-level packages ``workers`` and ``learner``.
"""

__version__ = "0.1.0"
SCHEMA_VERSION = 1
"""Version of every payload in Redis, in the journal, in manifests; an unknown one fails closed."""
