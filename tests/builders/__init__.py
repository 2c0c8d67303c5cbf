"""What several test files build: stores, SAEs, indexes, subjects, and how to compare numbers."""
