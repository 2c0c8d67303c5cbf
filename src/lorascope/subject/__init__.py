"""The model under study: base model, adapter, and the sites where its rows are read."""
