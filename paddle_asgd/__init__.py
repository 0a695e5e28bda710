# SPDX-License-Identifier: Apache-2.0
"""The stochastic average gradient for PaddlePaddle: the public names, and nothing else."""

from .averages.averaged_model import AveragedModel
from .averages.averaged_sgd import AveragedSGD
from .averages.callback import WeightAveraging
from .averages.post_hoc import PostHocEMA
from .averages.posthoc_weights import posthoc_weights
from .averages.rules import ema, power_ema, swa
from .averages.swalr import SWALR
from .averages.trigger import NonMonotonicTrigger
from .averages.update_bn import update_bn
from .sag.asgd import ASGD
from .sag.callback import BatchIndexCallback
from .sag.lipschitz import LipschitzSearch
from .sag.sampler import FixedBatchSampler
from .sag.watch import SlotMismatchWarning

__all__ = [
    "ASGD",
    "SWALR",
    "AveragedModel",
    "AveragedSGD",
    "BatchIndexCallback",
    "FixedBatchSampler",
    "LipschitzSearch",
    "NonMonotonicTrigger",
    "PostHocEMA",
    "SlotMismatchWarning",
    "WeightAveraging",
    "ema",
    "posthoc_weights",
    "power_ema",
    "swa",
    "update_bn",
]
__version__ = "0.1.0"
