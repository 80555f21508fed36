"""Images with labels, in three splits with one role each: train to learn, val to choose, test for the final report."""

from ofa.data.augment import Augment
from ofa.data.ilsvrc import imagenet
from ofa.data.images import ImageData, Split
from ofa.data.sources import Options, cifar10, digits, folder, parquet

__all__ = ["Augment", "ImageData", "Options", "Split", "cifar10", "digits", "folder", "imagenet", "parquet"]
