"""From a retention to the entries of each KV head, and the plan that says so."""
