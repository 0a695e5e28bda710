"""The stochastic average gradient for PaddlePaddle: the public names, and nothing else."""

from .asgd import ASGD

__all__ = ["ASGD"]
__version__ = "0.1.0"
