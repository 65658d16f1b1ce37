"""lm-evaluation-harness over compressed caches. Needs `pip install 'kvpolicy[lm-eval]'`."""
