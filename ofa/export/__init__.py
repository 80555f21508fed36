"""Files that run: ONNX for a runtime, weights and a card from which the network can be rebuilt."""

MICRO_RUNTIMES = ("tflm", "c")  # of microcontrollers: `budget` proves them; here for what needs no torch
