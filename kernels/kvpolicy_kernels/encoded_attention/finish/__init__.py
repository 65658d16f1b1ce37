"""The launch that attention over codes ends with."""
