"""The parts of the training loop in `ofa.train`: what it optimises with, watches, saves."""
