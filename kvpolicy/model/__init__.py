"""What a model is to kvpolicy: its layers, read from its configuration."""
