"""Layers, losses and initialisation. Names and defaults follow PyTorch, and so do the keys of ``state_dict``."""

from brim.nn import functional, init
from brim.nn.activation import GELU, LeakyReLU, LogSoftmax, ReLU, Sigmoid, SiLU, Softmax, Tanh
from brim.nn.batchnorm import BatchNorm1d, BatchNorm2d
from brim.nn.containers import ModuleDict, ModuleList, Sequential
from brim.nn.conv import Conv2d
from brim.nn.dropout import Dropout
from brim.nn.embedding import Embedding
from brim.nn.layernorm import LayerNorm
from brim.nn.linear import Flatten, Identity, Linear
from brim.nn.loss import BCEWithLogitsLoss, CrossEntropyLoss, HuberLoss, L1Loss, MSELoss, NLLLoss
from brim.nn.module import Module
from brim.nn.parameter import Parameter
from brim.nn.pool import AvgPool2d, MaxPool2d

__all__ = [
    "GELU",
    "AvgPool2d",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Flatten",
    "HuberLoss",
    "Identity",
    "L1Loss",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "Module",
    "ModuleDict",
    "ModuleList",
    "NLLLoss",
    "Parameter",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "functional",
    "init",
]
