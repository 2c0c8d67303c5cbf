"""Activations: what every adapted module reads of every token, kept as rows."""
