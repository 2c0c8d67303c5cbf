"""The demo: generated problems and a small subject model, run through every stage."""
