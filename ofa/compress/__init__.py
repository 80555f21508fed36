"""Make a plain network smaller: prune its channels, fine-tune it, quantize its ONNX file."""
