"""Runs the kernels of ``kernels/`` on a CPU: the same text, geometry and argument bytes that a GPU would get."""

from tests.kernels.emulation.launcher import H200_LIKE, SMALL, EmulatedLauncher, EmulationError

__all__ = ["H200_LIKE", "SMALL", "EmulatedLauncher", "EmulationError"]
