"""The parts in configs/data, and the command line of the data."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from fedlight.data import DatasetPartition, FederatedDataModule, ImageData

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.fixture
def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FederatedDataModule, "data", required=True)
    return parser


def build(parser, *arguments):
    config = parser.parse_args(list(arguments))
    text = parser.dump(config, skip_none=False)
    assert parser.dump(parser.parse_string(text), skip_none=False) == text
    instantiate = (
        getattr(parser, "instantiate", None) or parser.instantiate_classes
    )  # named so before jsonargparse 4.49
    return instantiate(config).data


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_part_partitions_data(parser, path, tmp_path):
    data = build(parser, "--data", str(path))
    assert isinstance(data, ImageData)
    if data.source != "digits":  # the same setting on data that is at hand
        changes = {"source": "digits", "normalize": "auto", "download": "false", "image_size": "null"}
        changes |= {"test_domains": "null", "partitioner": "IID", "columns": "null", "num_clients": "8"}
        data = build(parser, "--data", str(path), *(f"--data.{key}={value}" for key, value in changes.items()))
    data.setup()
    assert data.partition_counts().sum() == 1442


def test_there_are_parts():
    assert {"digits", "cifar10", "cifar100_iid", "pacs", "fashion_mnist"} <= {path.stem for path in CONFIGS}


def test_short_names_and_dotted_keys(parser):
    data = build(
        parser, "--data", "ImageData", "--data.source", "digits", "--data.partitioner", "DirichletClients",
        "--data.partitioner.alpha", "0.7", "--data.normalize", "[[0.5],[0.25]]", "--data.num_clients", "5",
    )  # fmt: skip
    data.setup()
    assert repr(data.partitioner) == "DirichletClients(alpha=0.7)"
    assert data.val_dataset().transform.std == (0.25,)


def test_a_torch_dataset_from_yaml(parser):
    data = build(
        parser, "--data=DatasetPartition", "--data.train=torchvision.datasets.FakeData", "--data.train.size=30",
        "--data.num_clients=3", "--data.partitioner=QuantitySkew", "--data.partitioner.sigma=0.5",
    )  # fmt: skip
    assert isinstance(data, DatasetPartition)
    data.setup()
    assert sum(data.client_size(client) for client in range(3)) == 30
