"""The SAE class and its reader under the published module name."""

from lorascope.sae.model import SAE, load_sae

BatchTopKSAE = SAE

__all__ = ["BatchTopKSAE", "load_sae"]
