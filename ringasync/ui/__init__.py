"""The read-only web page of a run: `ringasync ui`."""
