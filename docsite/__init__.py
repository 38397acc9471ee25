"""The documentation site's own parts: generated reference pages and how fences are shown."""
