"""Several adapters of one base: what differs between them, by features that they share or not."""
