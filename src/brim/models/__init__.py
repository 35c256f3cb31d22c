"""Known networks as trainable modules, for planning and training: transformers (``gpt2``), residual networks (``resnet``).

``import brim`` does not load them: ``from brim.models import GPT2``.
"""

from brim.models.gpt2 import GPT2, GPT2_SIZES, next_token_loss
from brim.models.resnet import ResNet, resnet18, resnet50

__all__ = ["GPT2", "GPT2_SIZES", "ResNet", "next_token_loss", "resnet18", "resnet50"]
