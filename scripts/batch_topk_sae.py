"""Published module name of the SAE class and of the function that reads its files."""

from lorascope.sae.model import SAE, load_sae

BatchTopKSAE = SAE

__all__ = ["BatchTopKSAE", "load_sae"]
