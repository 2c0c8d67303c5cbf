"""The model under study: its weights, its texts, and the places where it is read."""
