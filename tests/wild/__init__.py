"""Branches in the form that real libraries give them, against ordinary autograd."""
