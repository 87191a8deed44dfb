"""Networks for programs without this library: StableHLO or ONNX, with symbolic sizes."""

from jaxnets.export.onnx import export_onnx
from jaxnets.export.program import Program, export_program, load_program

__all__ = ["Program", "export_onnx", "export_program", "load_program"]
