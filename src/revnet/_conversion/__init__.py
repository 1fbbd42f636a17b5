"""Conversion of ordinary residual networks, in place and with unchanged weights."""
