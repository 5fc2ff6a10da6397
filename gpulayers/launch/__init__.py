"""The one boundary to CUDA: load kernel sources, specialise, check, compile, cache, launch.

A kernel is declared once (`Kernel`), launched with checked arguments, and compiled lazily per device. Sources lie in
``kernels/`` in a checkout and in ``gpulayers/_kernels/`` in an installed package.
"""

from gpulayers.launch.division import division
from gpulayers.launch.elementwise import Elementwise
from gpulayers.launch.keeping import Kept, keep, keeping
from gpulayers.launch.kernel import Kernel, Specialisation, alignment_of, is_aligned, kernel_list, vector_width
from gpulayers.launch.launcher import (
    CupyLauncher,
    DeviceProperties,
    Geometry,
    Launcher,
    Place,
    contiguous,
    device_properties,
    forget_stream,
    has_kernels,
    launcher_of,
    place_of,
    register_launcher,
    workspace,
    workspace_pieces,
)
from gpulayers.launch.prepared import Prepared, remember

__all__ = [
    "CupyLauncher",
    "DeviceProperties",
    "Elementwise",
    "Geometry",
    "Kernel",
    "Kept",
    "Launcher",
    "Place",
    "Prepared",
    "Specialisation",
    "alignment_of",
    "contiguous",
    "device_properties",
    "division",
    "forget_stream",
    "has_kernels",
    "is_aligned",
    "keep",
    "keeping",
    "kernel_list",
    "launcher_of",
    "place_of",
    "register_launcher",
    "remember",
    "vector_width",
    "workspace",
    "workspace_pieces",
]
