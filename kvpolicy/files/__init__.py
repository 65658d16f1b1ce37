"""Reading files that may be anything, and writing them whole."""
