"""The attention of a model: where ours takes its place, and what is seen there."""
