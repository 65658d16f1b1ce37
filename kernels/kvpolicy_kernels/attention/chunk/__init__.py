"""Attention of many queries over segments and a chunk: flash attention with both loops in one program."""
