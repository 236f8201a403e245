"""A classifier as a LightningModule, and the networks of the papers.

Every network here keeps its activations as modules, so that penalties on activations find them by themselves, and
takes ``num_classes`` as a required argument, so that a config names it once, in :class:`Classifier`.
"""

from fedlight.models.classifier import Classifier, NetFactory
from fedlight.models.cnn import CifarCNN, LeNet, SmallCNN, TinyImageNetCNN
from fedlight.models.mlp import MLP
from fedlight.models.resnet import ResNet18GN
from fedlight.models.text import CharLSTM, TextMLP

__all__ = ["Classifier", "NetFactory"]
__all__ += ["CifarCNN", "TinyImageNetCNN", "ResNet18GN", "SmallCNN", "LeNet", "MLP", "CharLSTM", "TextMLP"]
