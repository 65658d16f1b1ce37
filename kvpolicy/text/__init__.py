"""Text, split for the search and for what it must not see."""
