"""The sparse autoencoder: a dictionary of the directions that an adapter's rows are made of."""
