"""Make a network smaller: steps that prune, quantize or factorize it, and the packed file; int8 ONNX files."""
