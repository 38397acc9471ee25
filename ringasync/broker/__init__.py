"""The broker: records in Redis and the scripts that move them. See ``client.Broker``."""

from ringasync.broker.cancelling import keep_cancellations

keep_cancellations()
