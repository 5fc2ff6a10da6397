"""Batch normalisation: operations, their array functions, a NumPy body and a kernel body."""
