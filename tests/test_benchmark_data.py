"""The benchmarks' files: small ones in the published formats, whole and broken, and stand-ins."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint._extras import MissingExtraError
from symplectic_adjoint.datasets import (
    BENCHMARKS,
    DataError,
    DataNotFoundError,
    Dataset,
    load_benchmark,
    stand_in,
)
from symplectic_adjoint.datasets.frames import read_frame

RNG = np.random.default_rng


def load(name: str, folder: Path, rows: tuple[int, int, int], seed: int = 0) -> Dataset:
    """A benchmark whose published sizes are these, as its specification is data."""
    return replace(BENCHMARKS[name], rows=rows).load(folder, seed)


def written(path: Path, array: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


class _Old:
    """An object of pandas as Python 2 pickled it: made without arguments, then given a state."""

    def __reduce__(self) -> Any:
        return type(self), (), self.__dict__["state"]


def old_frame(path: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a frame in the layout of the published file (pandas 0.1x), without pandas."""
    names = {"pandas.core.frame": "DataFrame", "pandas.core.internals": "BlockManager"}
    made = {}
    for module in ("pandas", "pandas.core"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    for module, name in (*names.items(), ("pandas.core.index", "_new_Index")):
        fake = ModuleType(module)
        cls = type(name, (_Old,), {"__module__": module, "__qualname__": name})
        setattr(fake, name, cls)
        monkeypatch.setitem(sys.modules, module, fake)
        made[name] = cls

    class Index:
        def __init__(self, data: Any) -> None:
            self.data = data

        def __reduce__(self) -> Any:
            return made["_new_Index"], (made["_new_Index"], {"data": self.data, "name": None})

    values = np.stack(list(columns.values()))
    axes = [Index(np.array(list(columns), dtype=object)), Index(np.arange(values.shape[1]))]
    manager = made["BlockManager"]()
    blocks = [{"values": values, "mgr_locs": slice(0, len(columns), 1)}]
    manager.state = (axes, [values], [axes[0]], {"0.14.1": {"axes": axes, "blocks": blocks}})
    frame = made["DataFrame"]()
    frame.state = {"_metadata": [], "_typ": "dataframe", "_data": manager}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(frame, protocol=2))


def gas_columns(count: int) -> dict[str, Any]:
    rng = RNG(0)
    columns = {name: rng.normal(size=count) for name in ("Time", "Meth", "Eth")}
    sensors = rng.normal(size=(8, count)) * 3 + 1
    for i, sensor in enumerate(sensors):
        columns[f"R{i}"] = sensor
        if i % 2:
            columns[f"S{i}"] = 2 * sensor + 0.01 * rng.normal(size=count)
    return columns


def test_miniboone_is_standardised_by_all_rows_but_the_test_rows(tmp_path: Path) -> None:
    rows = RNG(0).normal(size=(210, 43)) * 5 + 2
    written(tmp_path / "miniboone" / "data.npy", rows)
    data = load("miniboone", tmp_path, (171, 18, 21))
    seen = rows[:-21]
    expected = (rows - seen.mean(0)) / seen.std(0)
    found = torch.cat((data.train, data.validation, data.test))
    torch.testing.assert_close(found, torch.from_numpy(expected))
    torch.testing.assert_close(data.restore(data.test), torch.from_numpy(rows[-21:]))


def test_power_is_shuffled_blurred_and_cut_as_published(tmp_path: Path) -> None:
    rows = RNG(0).integers(0, 50, size=(200, 8)).astype(float)
    written(tmp_path / "power" / "data.npy", rows)
    data = load("power", tmp_path, (162, 18, 20))
    order = np.random.RandomState(42).permutation(200)  # what shuffles one axis shuffles rows
    kept = torch.from_numpy(rows[order][:, [0, 2, 4, 5, 6, 7]])
    restored = torch.cat([data.restore(x) for x in (data.train, data.validation, data.test)])
    noise = restored - kept
    # Blurred below the resolution of each column; the time of the day not at all.
    assert noise[:, 5].abs().max() < 1e-9
    bounds = torch.tensor([0.001, 0.01, 1.0, 1.0, 1.0]).double()
    assert bool(((noise[:, :5] > -1e-9) & (noise[:, :5] < bounds + 1e-9)).all())
    assert bool((noise[:, :5].amax(0) > 0.9 * bounds).all())
    both = torch.cat((data.train, data.validation))
    torch.testing.assert_close(both.std(0, correction=0), torch.ones(6).double())


def test_gas_loses_what_is_known_and_what_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = gas_columns(300)
    old_frame(tmp_path / "gas" / "ethylene_CO.pickle", columns, monkeypatch)
    data = load("gas", tmp_path, (243, 27, 30))
    # Of two columns that repeat each other the first goes.
    kept = ["R0", "S1", "R2", "S3", "R4", "S5", "R6", "S7"]
    rows = np.stack([columns[name] for name in kept], axis=1)
    expected = (rows - rows.mean(0)) / rows.std(0, ddof=1)
    found = torch.cat((data.train, data.validation, data.test))
    torch.testing.assert_close(found, torch.from_numpy(expected))


def hepmass_csv(path: Path, count: int, extra: int) -> Any:
    rng = RNG(count)
    rows = rng.normal(size=(count, 28 + extra))
    rows[:, 0] = np.arange(count) % 2
    for column in (5, 9, 13, 17, 21, 25):
        rows[:, column] = np.maximum(rows[:, column], 0.0)  # its smallest value occurs often
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(["# label", *(f"f{i}" for i in range(27))])]
    path.write_text("\n".join([*lines, *(",".join(map(repr, row)) for row in rows.tolist())]))
    return rows


def test_hepmass_is_its_signal_without_discrete_columns(tmp_path: Path) -> None:
    train = hepmass_csv(tmp_path / "hepmass" / "1000_train.csv", 200, extra=0)
    test = hepmass_csv(tmp_path / "hepmass" / "1000_test.csv", 60, extra=1)
    data = load("hepmass", tmp_path, (90, 10, 30))
    columns = [i for i in range(1, 28) if i not in (5, 9, 13, 17, 21, 25)]
    signal = train[train[:, 0] == 1][:, columns]
    mean, scale = signal.mean(0), signal.std(0, ddof=1)
    torch.testing.assert_close(data.train, torch.from_numpy((signal[:90] - mean) / scale))
    held_out = test[test[:, 0] == 1][:, columns]
    torch.testing.assert_close(data.test, torch.from_numpy((held_out - mean) / scale))


def idx(path: Path, images: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_mnist_is_dequantised_within_its_grey_levels(tmp_path: Path) -> None:
    images = RNG(0).integers(0, 256, size=(60, 28, 28), dtype=np.uint8)
    idx(tmp_path / "mnist" / "train-images-idx3-ubyte", images)
    idx(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz", images[:10])
    data = load("mnist", tmp_path, (50, 10, 10), seed=3)
    levels = torch.cat((data.train, data.validation)).mul(256).floor().to(torch.uint8)
    assert torch.equal(levels, torch.from_numpy(images.reshape(60, -1)))
    assert data.image_shape == (28, 28)
    assert data.train.max() < 1
    again, other = (load("mnist", tmp_path, (50, 10, 10), seed=s) for s in (3, 4))
    assert torch.equal(data.test, again.test)
    assert not torch.equal(data.test, other.test)


def test_bsds300_is_taken_as_it_is(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "BSDS300" / "BSDS300.hdf5"
    path.parent.mkdir()
    parts = {n: RNG(n_).normal(size=(c, 63)) for n_, (n, c) in enumerate(_BSDS.items())}
    with h5py.File(path, "w") as file:
        for name, rows in parts.items():
            file[name] = rows
    data = load("bsds300", tmp_path, (30, 4, 6))
    for part, rows in zip((data.train, data.validation, data.test), parts.values(), strict=True):
        assert torch.equal(part, torch.from_numpy(rows))
    path.write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="not the published HDF5 file"):
        load("bsds300", tmp_path, (30, 4, 6))


_BSDS = {"train": 30, "validation": 4, "test": 6}


def test_bsds300_without_h5py_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "BSDS300").mkdir()
    (tmp_path / "BSDS300" / "BSDS300.hdf5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"symplectic-adjoint\[data\]"):
        load_benchmark("bsds300", tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_files_are_named_with_their_place_and_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError) as caught:
        load_benchmark(name, tmp_path)
    message = str(caught.value)
    for file in BENCHMARKS[name].files:
        assert str(tmp_path / file) in message
    assert BENCHMARKS[name].source in message
    assert "stand-in" in message


def test_an_unknown_benchmark_is_named_with_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'hepmass'"):
        load_benchmark("hepmas", tmp_path)


def test_other_sizes_than_the_published_ones_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "miniboone" / "data.npy", RNG(0).normal(size=(100, 43)))
    with pytest.raises(DataError, match=r"training split has shape \(81, 43\).*\(29556, 43\)"):
        load_benchmark("miniboone", tmp_path)


def test_a_value_that_is_not_finite_is_named_with_its_place(tmp_path: Path) -> None:
    rows = RNG(0).normal(size=(100, 43))
    rows[95, 6] = np.inf
    written(tmp_path / "miniboone" / "data.npy", rows)
    with pytest.raises(DataError, match="row 6, column 7 of the test split is inf"):
        load("miniboone", tmp_path, (81, 9, 10))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("power", np.zeros((20, 7)), r"shape \(20, 7\), not \(n, 8\)"),
        ("miniboone", np.zeros(20), r"shape \(20,\), not \(n, 43\)"),
        ("miniboone", np.array(["a"] * 20), "not real numbers"),
    ],
)
def test_arrays_of_another_shape_or_kind_are_refused(
    tmp_path: Path, name: str, array: Any, message: str
) -> None:
    written(tmp_path / BENCHMARKS[name].files[0], array)
    with pytest.raises(DataError, match=message):
        load_benchmark(name, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no IDX file"),
        (struct.pack(">4I", 0x801, 2, 28, 28), "begins with 0x803, this one with 0x801"),
        (struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1567), "take 1584 bytes, the file has 1583"),
    ],
)
def test_broken_images_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    for name in BENCHMARKS["mnist"].files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_benchmark("mnist", tmp_path)


def test_a_csv_that_is_cut_within_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hepmass" / "1000_train.csv"
    hepmass_csv(path, 20, extra=0)
    hepmass_csv(tmp_path / "hepmass" / "1000_test.csv", 20, extra=1)
    path.write_text(path.read_text()[:-200])
    with pytest.raises(DataError, match="a label and 27 features"):
        load_benchmark("hepmass", tmp_path)


class _Harmful:
    def __reduce__(self) -> Any:
        return print, ("code of the file ran",)


def test_a_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.pickle"
    path.write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(DataError, match=r"asks for builtins\.print"):
        read_frame(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"abc", pickle.dumps({"a": [1.0]}), pickle.dumps([])])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.pickle"
    path.write_bytes(content)
    with pytest.raises(DataError, match="table"):
        read_frame(path)


def test_a_frame_without_the_published_columns_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = gas_columns(30)
    del columns["Eth"]
    old_frame(tmp_path / "gas" / "ethylene_CO.pickle", columns, monkeypatch)
    with pytest.raises(DataError, match="no column 'Eth'"):
        load_benchmark("gas", tmp_path)


def test_frames_of_the_pandas_installed_here_are_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.5], "b": [3, 4], "c": [0.5, 0.25]})
    frame.to_pickle(tmp_path / "frame.pickle")
    found = read_frame(tmp_path / "frame.pickle")
    assert {name: column.tolist() for name, column in found.items()} == frame.to_dict("list")


def covariance(rows: Tensor) -> Tensor:
    return torch.cov(rows.T)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_stand_ins_have_the_shape_of_the_benchmark_and_say_what_they_are(name: str) -> None:
    data = stand_in(name, rows=(500, 20, 100), seed=1)
    like = BENCHMARKS[name]
    assert data.name == f"{name} (stand-in)"
    assert tuple(data.train.shape) == (500, like.dim)
    assert (len(data.validation), len(data.test)) == (20, 100)
    assert data.image_shape == like.image_shape
    assert data.fingerprint() == stand_in(name, rows=(500, 20, 100), seed=1).fingerprint()
    assert data.fingerprint() != stand_in(name, rows=(500, 20, 100), seed=2).fingerprint()
    if like.image_shape is None:
        torch.testing.assert_close(data.train.std(0), torch.ones(like.dim).double())
        correlation = covariance(data.train) - torch.eye(like.dim)
        assert correlation.abs().max() > 0.3, "independent columns would be too easy"
    else:
        assert 0 < data.train.min() < data.train.max() < 1


def test_stand_ins_have_the_published_sizes_unless_told_otherwise() -> None:
    data = stand_in("miniboone")
    assert (len(data.train), len(data.validation), len(data.test)) == BENCHMARKS["miniboone"].rows


def test_stand_ins_of_too_few_rows_are_refused() -> None:
    with pytest.raises(ArgumentError, match="at least two rows"):
        stand_in("gas", rows=(10, 1, 10))
