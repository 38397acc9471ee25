"""The broker: records in Redis and the scripts that move them. See ``client.Broker``."""
