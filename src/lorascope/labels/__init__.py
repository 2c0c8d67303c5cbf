"""What each feature responds to, in words, and how well these words tell where it fires."""
