"""Training: the loss that never holds all logits."""

from aquila2_tut.train.errors import TrainError
from aquila2_tut.train.loss import causal_loss, chunked_cross_entropy

__all__ = ["TrainError", "causal_loss", "chunked_cross_entropy"]
