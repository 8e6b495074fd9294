"""Quantized networks as small files: packed safetensors and ONNX."""
