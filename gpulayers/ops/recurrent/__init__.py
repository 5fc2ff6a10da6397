"""Recurrent steps and sequences: operations, their array functions, bodies for NumPy and for devices."""
