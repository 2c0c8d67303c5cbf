"""What rows, sites and features do to the model's output, measured by changing them."""
