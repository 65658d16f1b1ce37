"""Attention of many queries over codes: tiles of queries, and a chunk behind them by the kernel of 16 bits."""
