"""The broker client: everything that roles do with Redis, each transition one atomic script."""

from __future__ import annotations

from ringasync.broker.feeding import FeedingMixin
from ringasync.broker.runs import RunMixin
from ringasync.broker.sessions import SessionMixin
from ringasync.broker.tools import ToolsMixin
from ringasync.broker.training import TrainingMixin
from ringasync.broker.working import WorkingMixin


class Broker(RunMixin, SessionMixin, FeedingMixin, WorkingMixin, TrainingMixin, ToolsMixin):
    """One process's way to the run.

    Example::

        broker = await Broker.connect("redis://127.0.0.1:6379/0", "demo")
        await broker.join_run(config_hash)
        await broker.open_session("w1-a3f9", "worker", 5000, {"worker": "w1"})
        for lease in await broker.take("w1-a3f9", 8, loaded_version=3):
            ...
    """
