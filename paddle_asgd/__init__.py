# SPDX-License-Identifier: Apache-2.0
"""The stochastic average gradient for PaddlePaddle: the public names, and nothing else."""

from .averages.averaged_model import AveragedModel
from .averages.callback import WeightAveraging
from .averages.rules import ema, power_ema, swa
from .sag.asgd import ASGD
from .sag.callback import BatchIndexCallback
from .sag.lipschitz import LipschitzSearch
from .sag.sampler import FixedBatchSampler
from .sag.watch import SlotMismatchWarning

__all__ = [
    "ASGD",
    "AveragedModel",
    "BatchIndexCallback",
    "FixedBatchSampler",
    "LipschitzSearch",
    "SlotMismatchWarning",
    "WeightAveraging",
    "ema",
    "power_ema",
    "swa",
]
__version__ = "0.1.0"
