"""The exception of the model and its cache."""


class ModelError(ValueError):
    """Inputs that no forward pass can be made of, or a cache that cannot hold them."""
