"""Known networks as trainable modules, to plan and to train: transformers (``gpt2``), residual networks (``resnet``).

``import brim`` does not load them: ``from brim.models import GPT2``.
"""

from brim.models.gpt2 import GPT2, GPT2_SIZES, next_token_loss
from brim.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet50

__all__ = [
    "GPT2",
    "GPT2_SIZES",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "next_token_loss",
    "resnet18",
    "resnet50",
]
