"""What the codes of entries are in products."""
