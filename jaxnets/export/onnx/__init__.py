"""ONNX files of networks: jaxprs written as graphs, checked by onnxruntime."""

from jaxnets.export.onnx.export import export_onnx

__all__ = ["export_onnx"]
