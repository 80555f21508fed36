"""Training on the device itself: what updating a network needs, a plan under a limit, and fine-tuning by the plan."""
