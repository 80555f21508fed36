"""Distillation: losses between a student and its teachers, and what taps, matches and weighs them."""

from ofa.distill.distiller import Distiller
from ofa.distill.elastic import observe
from ofa.distill.features import (
    attention_loss,
    boundary_loss,
    channel_loss,
    channel_map_loss,
    flow_loss,
    hint_loss,
    neuron_loss,
    normalized_feature_loss,
)
from ofa.distill.logits import alpha_divergence, ensemble, kl_loss, label_loss, logit_loss, soft_label_loss
from ofa.distill.relations import relation_angle_loss, relation_distance_loss
from ofa.distill.settings import Distillation
from ofa.distill.taps import Outputs, stage_ends

__all__ = [
    "Distillation",
    "Distiller",
    "Outputs",
    "alpha_divergence",
    "attention_loss",
    "boundary_loss",
    "channel_loss",
    "channel_map_loss",
    "ensemble",
    "flow_loss",
    "hint_loss",
    "kl_loss",
    "label_loss",
    "logit_loss",
    "neuron_loss",
    "normalized_feature_loss",
    "observe",
    "relation_angle_loss",
    "relation_distance_loss",
    "soft_label_loss",
    "stage_ends",
]
