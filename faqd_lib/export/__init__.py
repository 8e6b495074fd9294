"""Small files: packed and ONNX."""
