"""The `revnet` command: train a reversible transformer, sample from it, compare executions."""
