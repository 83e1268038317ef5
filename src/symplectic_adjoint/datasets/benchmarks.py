"""The benchmarks of density estimation, from the files that their authors published.

The five tables in the preprocessing of Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow
for Density Estimation", NIPS 2017, section 4 and its published code, which FFJORD and the papers
after it share; MNIST dequantised to (0, 1).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint._extras import require
from symplectic_adjoint.datasets.base import Dataset, dequantised
from symplectic_adjoint.datasets.errors import DataError, DataNotFoundError
from symplectic_adjoint.datasets.files import read_array
from symplectic_adjoint.datasets.frames import read_frame

TABLES = "https://zenodo.org/records/1161203 (data.tar.gz)"
DIGITS = "https://yann.lecun.com/exdb/mnist or any mirror of it"


@dataclass(frozen=True)
class Splits:
    """Rows of the three splits in the coordinates of the benchmark, and the way back.

    Attributes:
        parts: Training, validation and test rows.
        mean: Mean that was taken off, shape (dim,).
        scale: Deviation that was divided by, shape (dim,).
    """

    parts: tuple[Tensor, Tensor, Tensor]
    mean: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its published sizes, where its files lie, and how they are read.

    Attributes:
        name: Name.
        dim: Number of columns.
        rows: Rows of the training, validation and test splits.
        files: Paths below the folder of all data.
        source: Where the files can be had.
        read: Reads the files into splits; takes them and a seed.
        image_shape: Height and width if a row is an image.
        levels: Grey levels of a pixel.
    """

    name: str
    dim: int
    rows: tuple[int, int, int]
    files: tuple[str, ...]
    source: str
    read: Callable[[list[Path], int], Splits]
    image_shape: tuple[int, int] | None = None
    levels: int | None = None

    def load(self, folder: Path, seed: int = 0) -> Dataset:
        """Reads the benchmark.

        Args:
            folder: The folder that holds the data of all benchmarks.
            seed: Seed of the dequantisation of images; the tables have none.

        Raises:
            DataNotFoundError: A file is missing; the message says what to put where.
            DataError: A file cannot be read, or gives other sizes than the published ones.
            MissingExtraError: The format needs a package that is not installed.
        """
        splits = self.read(self.locate(folder), seed)
        self._check(folder, splits)
        train, validation, test = splits.parts
        return Dataset(
            self.name, train, validation, test, splits.mean, splits.scale, self.image_shape
        )

    def locate(self, folder: Path) -> list[Path]:
        """The files of the benchmark.

        Raises:
            DataNotFoundError: A file is missing; the message says what to put where.
        """
        return [self._file(folder, name) for name in self.files]

    def _file(self, folder: Path, name: str) -> Path:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        wanted = ", ".join(str(folder / each) for each in self.files)
        raise DataNotFoundError(
            f"{self.name} needs {wanted}; {folder / name} is not there. Get it from {self.source} "
            f"and unpack it into {folder}, or name the folder that holds {self.files[0]}. Without "
            "a folder, a generated stand-in of the same shape is used and named as one"
        )

    def _check(self, folder: Path, splits: Splits) -> None:
        where = f"{self.name} from {folder}"
        for part, name, rows in zip(
            splits.parts, ("training", "validation", "test"), self.rows, strict=True
        ):
            if tuple(part.shape) != (rows, self.dim):
                raise DataError(
                    f"{where}: the {name} split has shape {tuple(part.shape)} after preprocessing, "
                    f"the published one has {(rows, self.dim)}; the files are cut or not the "
                    f"published ones. Get them again from {self.source}"
                )
            bad = (~part.isfinite()).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                raise DataError(
                    f"{where}: row {row + 1}, column {column + 1} of the {name} split is "
                    f"{float(part[row, column])}; get the files again from {self.source}"
                )


def load_benchmark(name: str, folder: str | Path, *, seed: int = 0) -> Dataset:
    """Loads a benchmark of density estimation from its published files.

    The rows are in the coordinates in which scores are published: standardised tables (BSDS300 as
    it is), and dequantised pixels in (0, 1).

    Args:
        name: One of ``BENCHMARKS``: "power", "gas", "hepmass", "miniboone", "bsds300", "mnist".
        folder: The folder that holds the data of all benchmarks, as the published archive does.
        seed: Seed of the dequantisation of images.

    Returns:
        The published splits, float64.

    Raises:
        UnknownNameError: There is no such benchmark.
        DataNotFoundError: A file is missing; the message says what to put where.
        DataError: A file cannot be read, or gives other sizes than the published ones.
        MissingExtraError: The format needs a package that is not installed.

    Example:
        >>> load_benchmark("power", "no/such/folder")
        Traceback (most recent call last):
        ...
        symplectic_adjoint.datasets.errors.DataNotFoundError: power needs ...
    """
    return benchmark(name).load(Path(folder).expanduser(), seed)


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in BENCHMARKS:
        raise UnknownNameError("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def _tenths(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last tenth is the test split, the last tenth of what is left the validation split."""
    rest, test = _cut(rows)
    train, validation = _cut(rest)
    return train, validation, test


def _cut(rows: Tensor) -> tuple[Tensor, Tensor]:
    tenth = len(rows) // 10
    return rows[: len(rows) - tenth], rows[len(rows) - tenth :]


def _standardised(
    parts: tuple[Tensor, Tensor, Tensor], like: Tensor, correction: int = 0
) -> Splits:
    """Splits in units of the deviation of ``like``, about its mean."""
    mean, scale = like.mean(0), like.std(0, correction=correction)
    train, validation, test = ((part - mean) / scale for part in parts)
    return Splits((train, validation, test), mean, scale)


def _power(paths: list[Path], seed: int) -> Splits:
    """Shuffled with a fixed seed, two columns left out, noise below the resolution added."""
    numpy = require("numpy")
    rows = read_array(paths[0])
    if rows.ndim != 2 or rows.shape[1] != 8:
        raise DataError(f"{paths[0]}: the array has shape {rows.shape}, not (n, 8)")
    random = numpy.random.RandomState(42)  # the published splits are those of this generator
    random.shuffle(rows)
    rows = numpy.delete(rows, (1, 3), axis=1)
    voltage = 0.01 * random.rand(len(rows), 1)
    gap = 0.001 * random.rand(len(rows), 1)
    submeters = random.rand(len(rows), 3)
    time = numpy.zeros((len(rows), 1))
    parts = _tenths(torch.from_numpy(rows + numpy.hstack((gap, voltage, submeters, time))))
    return _standardised(parts, torch.cat(parts[:2]))


def _gas(paths: list[Path], seed: int) -> Splits:
    """Without the concentrations and the time, and without columns that almost repeat another."""
    columns = read_frame(paths[0])
    for name in ("Meth", "Eth", "Time"):
        if columns.pop(name, None) is None:
            raise DataError(f"{paths[0]}: there is no column {name!r}, only {list(columns)}")
    numpy = require("numpy")
    rows = torch.from_numpy(numpy.stack([x.astype(numpy.float64) for x in columns.values()], 1))
    while len(repeated := (torch.corrcoef(rows.T) > 0.98).sum(1).gt(1).nonzero()):
        first = int(repeated[0])
        rows = torch.cat((rows[:, :first], rows[:, first + 1 :]), dim=1)
    return _standardised(_tenths(rows), rows, correction=1)


def _hepmass(paths: list[Path], seed: int) -> Splits:
    """The signal alone, without columns whose smallest value occurs more than five times."""
    train, test = (_signal(path) for path in paths)
    smallest = (train == train.min(0).values).sum(0)
    train, test = (rows[:, smallest <= 5] for rows in (train, test))
    return _standardised((*_cut(train), test), train, correction=1)


def _signal(path: Path) -> Tensor:
    """Features of the rows with label 1. The test file has one column more than the other."""
    numpy = require("numpy")
    width = 28
    try:
        rows = numpy.loadtxt(path, delimiter=",", skiprows=1, usecols=range(width), ndmin=2)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: not a .csv file of a label and {width - 1} features ({error})"
        ) from error
    return torch.from_numpy(rows[rows[:, 0] == 1, 1:])


def _miniboone(paths: list[Path], seed: int) -> Splits:
    rows = read_array(paths[0])
    if rows.ndim != 2:
        raise DataError(f"{paths[0]}: the array has shape {rows.shape}, not (n, 43)")
    parts = _tenths(torch.from_numpy(rows))
    return _standardised(parts, torch.cat(parts[:2]))


def _bsds300(paths: list[Path], seed: int) -> Splits:
    """As published: patches with their mean taken off, in splits."""
    h5py: Any = require("h5py", extra="data")
    try:
        with h5py.File(paths[0], "r") as file:
            arrays = [file[name][:] for name in ("train", "validation", "test")]
    except (OSError, KeyError) as error:
        raise DataError(f"{paths[0]}: not the published HDF5 file ({error})") from error
    train, validation, test = (torch.from_numpy(array).double() for array in arrays)
    width = train.shape[-1]
    return Splits(
        (train, validation, test),
        torch.zeros(width, dtype=torch.float64),
        torch.ones(width, dtype=torch.float64),
    )


def _mnist(paths: list[Path], seed: int) -> Splits:
    """The last sixth of the training images is the validation split."""
    images, test = (read_images(path) for path in paths)
    generator = torch.Generator().manual_seed(seed)
    rows, test = (dequantised(part, 256, generator) for part in (images, test))
    held_out = len(rows) // 6
    train, validation = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    width = rows.shape[1]
    return Splits(
        (train, validation, test),
        torch.zeros(width, dtype=torch.float64),
        torch.ones(width, dtype=torch.float64),
    )


def read_images(path: Path) -> Tensor:
    """Reads images in the IDX format of MNIST, gzipped if the name ends in .gz.

    Returns:
        Grey levels, float64, shape (n, height * width).

    Raises:
        DataError: The file is no such file, or is cut.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not readable ({error})") from error
    if len(content) < 16:
        raise DataError(f"{path}: {len(content)} bytes are no IDX file of images")
    magic, *shape = struct.unpack(">4I", content[:16])
    if magic != 0x803:
        raise DataError(
            f"{path}: an IDX file of images begins with 0x803, this one with {magic:#x}"
        )
    if len(content) != 16 + math.prod(shape):
        raise DataError(
            f"{path}: {shape[0]} images of {shape[1]} x {shape[2]} take {16 + math.prod(shape)} "
            f"bytes, the file has {len(content)}"
        )
    pixels = torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8)
    return pixels.reshape(shape[0], -1).double()


def _named() -> Iterator[Benchmark]:
    # The tables' splits: Papamakarios et al., table 1 of the supplement.
    yield Benchmark("power", 6, (1659917, 184435, 204928), ("power/data.npy",), TABLES, _power)
    yield Benchmark("gas", 8, (852174, 94685, 105206), ("gas/ethylene_CO.pickle",), TABLES, _gas)
    yield Benchmark(
        "hepmass",
        21,
        (315123, 35013, 174987),
        ("hepmass/1000_train.csv", "hepmass/1000_test.csv"),
        TABLES,
        _hepmass,
    )
    yield Benchmark(
        "miniboone", 43, (29556, 3284, 3648), ("miniboone/data.npy",), TABLES, _miniboone
    )
    yield Benchmark(
        "bsds300",
        63,
        (1000000, 50000, 250000),
        ("BSDS300/BSDS300.hdf5",),
        TABLES,
        _bsds300,
    )
    yield Benchmark(
        "mnist",
        784,
        (50000, 10000, 10000),
        ("mnist/train-images-idx3-ubyte", "mnist/t10k-images-idx3-ubyte"),
        DIGITS,
        _mnist,
        image_shape=(28, 28),
        levels=256,
    )


BENCHMARKS = {each.name: each for each in _named()}
"""The benchmarks by name."""
