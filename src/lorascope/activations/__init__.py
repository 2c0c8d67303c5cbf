"""Activations: `A·x` of every adapted module for every token, stored as rows."""
