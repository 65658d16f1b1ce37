"""The caches that a model runs over, and generating with them."""
