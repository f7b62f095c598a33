"""Runnable examples: ``python -m cupyattn.examples.gemma3 "a prompt"``."""
