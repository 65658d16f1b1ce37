"""Defaults and limits that the shell and Python share."""

MODEL = "smollm2-135m"
CONTEXT = 1024  # tokens of a sequence
RETENTIONS = (0.5, 0.3, 0.1)
MIN_TOKENS = 128  # entries of a KV head, on average, that are kept whatever the retention
LEAST_SEQUENCES = 2  # of one, a bootstrap says nothing
