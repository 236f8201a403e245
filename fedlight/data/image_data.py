"""Image classification in memory, divided among clients."""

import math
from collections.abc import Sized

import torch
from lightning.fabric.utilities import rank_zero_info

from fedlight.checks import check_number, check_whole
from fedlight.data.arrays import ArrayDataset
from fedlight.data.augment import BatchTransform
from fedlight.data.images import ImageArrays, channel_statistics, holdout, limit
from fedlight.data.label_skew import DirichletClients
from fedlight.data.partition import Partitioner
from fedlight.data.partitioned import PartitionedDataModule
from fedlight.data.sources import download_source, load_source
from fedlight.seeding import generator

_EVAL_IMAGES, _EVAL_VALUES = 500, 2**22
# (mean, std) of each channel, of pixels in [0, 1].
STATISTICS: dict[str, tuple[list[float], list[float]]] = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "mnist": ([0.1307], [0.3081]),
    "fashion_mnist": ([0.2860], [0.3530]),
}


class ImageData(PartitionedDataModule):
    """Images of any source, kept in memory as bytes, divided among clients and read a batch at a time.

    Args:
        source: ``digits`` (comes with scikit-learn, no download), ``cifar10``, ``cifar100``, ``fashion_mnist``,
            ``mnist``, ``emnist`` (balanced) or ``svhn``; or an ``.npz`` file with ``x_train``, ``y_train``, ``x_test``,
            ``y_test`` and optionally ``group_train``; or a folder of class folders, with or without splits and domains;
            or a folder with the four files of MNIST or its kin; or, with natural clients, a folder of LEAF (FEMNIST) or
            a CSV file that lists images.
        num_clients: N; null for one client per natural group, with ``NaturalGroups``.
        partitioner: which client gets which images; by default ``DirichletClients(alpha=0.3)``.
        batch_size: images of a batch in local training.
        eval_batch_size: images of a batch in evaluation; by default 500, and more on a GPU where they are small (1,365
            of 3x32x32).
        augment: flip horizontally with probability ½, and with probability ½ crop at random out of the image padded by
            zeros. By default for colour images, but not for the digits of svhn.
        normalize: ``auto`` (known statistics of the source, else those of its training images), a name (``cifar10``,
            ``cifar100``, ``imagenet``, ``mnist``, ``fashion_mnist``), ``none``, or a list of means and one of standard
            deviations per channel, of pixels in [0, 1].
        val_fraction: share of each class of the training images that is held out for validation, before these are
            divided; 0: the test set is the validation set, too.
        seed: seed of the partition and of what is held out.
        root: folder of the sources that are downloaded.
        download: download the source to ``root`` if it is not there.
        limit_samples: use at most so many training and so many test images, for a quick trial.
        image_size: height and width that the images of a folder are resized to.
        test_domains: domains of a folder that are held out for the test.
        test_fraction: share of each class (and domain) that is held out of a folder or file without a test set.
        crop_padding: zeros around an image that is cropped at random, in pixels.
        held_out_clients: clients that never train, a number or a fraction of all, and are evaluated as new ones.
        columns: which columns of a CSV file are ``image`` (``image_id``), ``label`` (``class``), ``client``
            (``user_id``) and ``split``; ``{name}`` in that of images stands for another column.

    Attributes:
        classes: names of the classes, where the source has them.
        groups: names of the natural groups, where the source has them.
        input_shape: (channels, height, width); None before ``setup``.
    """

    def __init__(
        self,
        source: str = "digits",
        num_clients: int | None = 20,
        partitioner: Partitioner | None = None,
        batch_size: int = 50,
        eval_batch_size: int | None = None,
        augment: bool | None = None,
        normalize: str | tuple[list[float], list[float]] = "auto",
        val_fraction: float = 0.0,
        seed: int = 0,
        root: str = "data",
        download: bool = False,
        limit_samples: int | None = None,
        image_size: int | None = None,
        test_domains: list[str] | None = None,
        test_fraction: float = 0.2,
        crop_padding: int = 4,
        held_out_clients: int | float = 0,
        columns: dict[str, str] | None = None,
    ) -> None:
        size = _EVAL_IMAGES if eval_batch_size is None else eval_batch_size
        more = {"seed": seed, "held_out_clients": held_out_clients}
        super().__init__(num_clients, partitioner or DirichletClients(), batch_size, size, **more)
        self._eval_batch_size_is_given = eval_batch_size is not None
        check_number("`data.val_fraction`", val_fraction, below=1)
        check_whole("`data.crop_padding`", crop_padding, 0)
        pair = isinstance(normalize, list | tuple) and [isinstance(part, Sized) for part in normalize] == [True, True]
        if not pair and normalize not in ("auto", "none", *STATISTICS):
            known = ", ".join(["auto", "none", *STATISTICS])
            raise ValueError(f"`data.normalize` is {normalize!r}, but must be one of {known}, or [means, deviations].")
        self.source, self.root, self.download, self.limit_samples = source, root, download, limit_samples
        self.image_size, self.test_domains, self.test_fraction = image_size, test_domains, test_fraction
        self.augment, self.normalize, self.crop_padding = augment, normalize, crop_padding
        self.val_fraction, self.columns = val_fraction, columns
        self.classes: list[str] = []
        self.groups: list[str] = []
        self.input_shape: tuple[int, int, int] | None = None

    def eval_batch_size_on(self, device: torch.device) -> int:
        """On a GPU, by default, as many images as have 4 million values: what a batch costs there is to start it."""
        if self._eval_batch_size_is_given or device.type == "cpu" or self.input_shape is None:
            return self.eval_batch_size
        return max(_EVAL_IMAGES, _EVAL_VALUES // math.prod(self.input_shape))

    def prepare_data(self) -> None:
        """Download the source, if that is wanted and it is one that can be downloaded."""
        if self.download:
            download_source(self.source, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Load the images, hold out what is for validation and divide the rest among the clients."""
        if self.partition is not None:
            return
        held = self.image_size, self.test_domains, self.test_fraction, self.columns
        arrays = load_source(self.source, self.root, *held)
        if self.limit_samples is not None:
            arrays = limit(arrays, self.limit_samples, generator(self.seed, "limit samples"))
        self.classes, self.groups = arrays.classes, arrays.groups
        channels, height, width = arrays.x_train.shape[1:]
        self.input_shape = (channels, height, width)
        evaluation, training = self._transforms(arrays)
        stored = ArrayDataset(arrays.x_train, arrays.y_train, transform=training)
        self._test = ArrayDataset(arrays.x_test, arrays.y_test, transform=evaluation)
        self._val, group_val = self._test, arrays.group_test
        self._train, groups = stored, arrays.group_train
        if self.val_fraction > 0:
            rows = holdout(arrays.y_train, self.val_fraction, generator(self.seed, "validation split"))
            if 0 in map(len, rows):
                left = f"{len(rows[0])} for training and {len(rows[1])} for validation"
                what = f"`data.val_fraction` is {self.val_fraction}: of {len(arrays.y_train)} training images that"
                raise ValueError(f"{what} leaves {left}.")
            self._train, self._val = stored.view(rows[0], training), stored.view(rows[1], evaluation)
            if groups is not None:
                groups, group_val = groups[rows[0]], groups[rows[1]]
        targets, val_targets = (d.targets[d.positions(torch.arange(len(d)))] for d in (self._train, self._val))
        self.divide(len(targets), targets, arrays.num_classes, groups)
        self.stratify((targets, val_targets), None if groups is None or group_val is None else (groups, group_val))

    def _transforms(self, arrays: ImageArrays) -> tuple[BatchTransform, BatchTransform]:
        """How images are normalised for evaluation; and for training, with augmentation if there is one."""
        channels = arrays.x_train.shape[1]
        if not isinstance(self.normalize, str):
            mean, std = self.normalize
        elif self.normalize == "none":
            mean, std = [0.0] * channels, [1.0] * channels
        elif self.normalize == "auto" and self.source not in STATISTICS:
            mean, std = channel_statistics(arrays.x_train)
        else:
            mean, std = STATISTICS[self.source if self.normalize == "auto" else self.normalize]
        if len(mean) != channels:
            raise ValueError(f"`data.normalize` is for {len(mean)} channels, but the images have {channels}.")
        augment = channels == 3 and self.source != "svhn" if self.augment is None else self.augment
        if self.crop_padding != 4 and not augment:
            rank_zero_info(f"data.crop_padding={self.crop_padding} changes nothing, as data.augment is false.")
        training = {"flip": 0.5, "crop_padding": self.crop_padding} if augment else {}
        return BatchTransform(mean, std), BatchTransform(mean, std, **training)  # type: ignore[arg-type]
