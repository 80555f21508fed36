"""Files that run: ONNX for a runtime, weights and a card from which the network can be rebuilt."""
