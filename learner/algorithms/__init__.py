"""Pure functions over tensors and plain data: no Redis, no asyncio, no model."""
