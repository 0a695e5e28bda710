"""The stochastic average gradient for PaddlePaddle: the public names, and nothing else."""

from .asgd import ASGD
from .lipschitz import LipschitzSearch
from .sampler import FixedBatchSampler
from .watch import SlotMismatchWarning

__all__ = ["ASGD", "FixedBatchSampler", "LipschitzSearch", "SlotMismatchWarning"]
__version__ = "0.1.0"
