"""Sequences as one differentiable operation, for `torch.compile` and `torch.func`."""
