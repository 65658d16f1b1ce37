"""What a model is to kvpolicy: its layers, read from its configuration, and the frame of its chats."""
