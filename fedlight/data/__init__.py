"""Data: sources, partitions among clients, and the datamodules that bring both to training."""

from fedlight.data.arrays import ArrayDataset
from fedlight.data.augment import BatchTransform
from fedlight.data.datamodule import FederatedDataModule
from fedlight.data.dataset_partition import DatasetPartition
from fedlight.data.federated import Federated
from fedlight.data.image_data import ImageData
from fedlight.data.images import ImageArrays
from fedlight.data.label_skew import DirichletClasses, DirichletClients, Shards
from fedlight.data.partition import IID, NaturalGroups, Partitioner, QuantitySkew
from fedlight.data.partitioned import PartitionedDataModule
from fedlight.data.picture import partition_csv, save_partition_picture
from fedlight.data.sources import load_source
from fedlight.data.text_data import TextData

__all__ = ["FederatedDataModule", "ImageData", "TextData", "DatasetPartition", "Federated", "PartitionedDataModule"]
__all__ += ["ArrayDataset", "BatchTransform", "ImageArrays", "load_source"]
__all__ += ["Partitioner", "IID", "DirichletClients", "DirichletClasses", "Shards", "QuantitySkew", "NaturalGroups"]
__all__ += ["partition_csv", "save_partition_picture"]
