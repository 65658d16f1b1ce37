"""The attention mass of entries that are codes."""
