"""The shipped demonstration: generated problems, a small subject model, the whole pipeline."""
