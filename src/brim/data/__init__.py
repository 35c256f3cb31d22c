"""Data: datasets in arrays, loaders that resume exactly, transforms, and readers of files and well-known data sets."""

from brim.data.dataset import ArrayDataset, Dataset, train_validation_split
from brim.data.idx import read_idx
from brim.data.loader import DataLoader
from brim.data.npz import read_npz
from brim.data.readers import DATASETS, load, load_digits, load_fashion_mnist, load_mnist
from brim.data.tables import read_csv
from brim.data.transforms import Cast, Compose, Flatten, Normalize, transform_config, transform_from_config

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "Cast",
    "Compose",
    "DataLoader",
    "Dataset",
    "Flatten",
    "Normalize",
    "load",
    "load_digits",
    "load_fashion_mnist",
    "load_mnist",
    "read_csv",
    "read_idx",
    "read_npz",
    "train_validation_split",
    "transform_config",
    "transform_from_config",
]
