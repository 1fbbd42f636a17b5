"""The `revnet` command: train a reversible transformer on real data, sample from it, compare executions."""
