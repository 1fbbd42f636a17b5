"""Which device the command runs on."""

from __future__ import annotations

import torch

from revnet.app.errors import UserError, first_line


def find_device(name: str) -> torch.device:
    """Return the device that `--device` names; "auto" is the accelerator where there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"there is no device {name!r} here: {first_line(error)}") from error
    device = torch.device(name)
    if device.type == "meta":
        raise UserError("the device 'meta' computes nothing: only `revnet plan --meta` can use it")
    return device
