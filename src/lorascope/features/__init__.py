"""What people read of each latent: its best examples, its statistics, and their files."""
