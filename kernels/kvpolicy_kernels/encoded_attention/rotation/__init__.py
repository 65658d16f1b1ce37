"""The rotation of single rows."""
