"""The page: one HTML file that shows the features and needs nothing else."""
