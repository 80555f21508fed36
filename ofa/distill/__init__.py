"""Distillation: losses between a student and its teachers, and what taps, matches and weighs them."""

from ofa.distill.logits import alpha_divergence, ensemble, kl_loss, label_loss, logit_loss, soft_label_loss

__all__ = ["alpha_divergence", "ensemble", "kl_loss", "label_loss", "logit_loss", "soft_label_loss"]
