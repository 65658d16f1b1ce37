"""The verbs as functions: what `kvpolicy eval` does at a shell, `kvpolicy.eval` does in Python, with the same JSON."""
