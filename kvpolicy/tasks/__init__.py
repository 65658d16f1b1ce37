"""Prompts whose answers are known: questions and needles."""
