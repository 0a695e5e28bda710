# SPDX-License-Identifier: Apache-2.0
"""Writes swalr.json: the learning rates of torch 2.13.0's SWALR. Needs torch, which the tests do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import MultiplicativeLR
from torch.optim.swa_utils import SWALR

RATE, SWA_RATE, FACTOR, START, EPOCHS = 0.5, 0.01, 0.9, 5, 15


def rates(follow: bool, **options: Any) -> list[float]:
    """The rate of each epoch. The scheduler is made where averaging starts: without annealing it acts when made."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    before = MultiplicativeLR(optimizer, lambda epoch: FACTOR) if follow else None
    swa, seen = None, []
    for epoch in range(EPOCHS):
        if swa is None and epoch >= (START if follow else 0):
            swa = SWALR(optimizer, swa_lr=SWA_RATE, **options)
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        (before if swa is None else swa).step()
    return seen


if __name__ == "__main__":
    cases = [
        {"follow": follow, "options": {"anneal_strategy": strategy, "anneal_epochs": epochs}}
        for follow in (False, True)
        for strategy in ("cos", "linear")
        for epochs in (0, 1, 4, 10)
    ]
    for case in cases:
        case["rates"] = rates(case["follow"], **case["options"])
    arguments = {"rate": RATE, "swa_rate": SWA_RATE, "factor": FACTOR, "start": START}
    lines = ",\n  ".join(json.dumps(case) for case in cases)
    text = f'{{\n "arguments": {json.dumps(arguments)},\n "cases": [\n  {lines}\n ]\n}}\n'
    Path(__file__).with_name("swalr.json").write_text(text)
