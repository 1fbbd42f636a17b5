"""Which device the command runs on."""

from __future__ import annotations

import torch

from revnet.app.errors import UserError


def find_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the accelerator where there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"there is no device {name!r} here: {str(error).splitlines()[0]}"
        ) from error
    return torch.device(name)
