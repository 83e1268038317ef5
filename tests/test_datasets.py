"""Data: real, simulated, and the user's own files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from symplectic_adjoint import datasets
from symplectic_adjoint.datasets import DataError, DataNotFoundError
from symplectic_adjoint.datasets.base import MIN_ROWS, make_dataset
from symplectic_adjoint.datasets.files import read_table
from symplectic_adjoint.datasets.toy import SAMPLERS


def _write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "rows", "dim"),
    [("digits", 1797, 64), ("breast_cancer", 569, 30), *[(toy, 10_000, 2) for toy in SAMPLERS]],
)
def test_named_data_are_split_eight_to_one_to_one_and_standardised(
    name: str, rows: int, dim: int
) -> None:
    data = datasets.load(name)
    assert data.dim == dim
    assert len(data.validation) == len(data.test) == rows // 10
    assert len(data.train) == rows - 2 * (rows // 10)
    assert data.train.dtype == torch.float64
    torch.testing.assert_close(data.train.mean(0), torch.zeros(dim, dtype=torch.float64))
    torch.testing.assert_close(data.train.std(0), torch.ones(dim, dtype=torch.float64))


@pytest.mark.parametrize("name", ["digits", "pinwheel"])
def test_a_seed_gives_the_same_rows_and_another_seed_gives_others(name: str) -> None:
    first, second, other = (datasets.load(name, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint() == second.fingerprint()
    assert torch.equal(first.train, second.train)
    assert first.fingerprint() != other.fingerprint()


def test_digits_are_dequantised_within_their_grey_level() -> None:
    from sklearn.datasets import load_digits

    data = datasets.load("digits", seed=5)
    parts = (data.train, data.validation, data.test)
    rows = torch.cat([data.restore(part) for part in parts])
    levels = (rows * 17).floor().long()
    original = torch.from_numpy(load_digits().data).long()
    assert data.image_shape == (8, 8)
    assert sorted(levels.tolist()) == sorted(original.tolist())
    assert (rows * 17 - levels).mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_score_in_the_original_coordinates_differs_by_log_scale() -> None:
    data = make_dataset("table", torch.randn(100, 2).double() * torch.tensor([2.0, 5.0]), seed=0)
    x = data.test
    standard = torch.distributions.Normal(torch.zeros(2).double(), 1.0)
    original = torch.distributions.Normal(data.mean, data.scale)
    difference = standard.log_prob(x).sum(1) - original.log_prob(data.restore(x)).sum(1)
    torch.testing.assert_close(difference, torch.full_like(difference, data.log_scale))


def test_toys_have_the_moments_and_the_support_that_they_promise() -> None:
    rows = {name: s(20_000, torch.Generator().manual_seed(0)) for name, s in SAMPLERS.items()}
    assert rows["8gaussians"].norm(dim=1).mean().item() == pytest.approx(3.015, abs=0.02)
    cells = ((rows["checkerboard"] + 4) / 2).floor().long()
    assert set((cells.sum(1) % 2).tolist()) == {0}
    assert cells.min() == 0
    assert cells.max() == 3
    assert rows["2spirals"].mean(0).abs().max() < 0.05
    assert rows["2spirals"].norm(dim=1).max() < math.pi + 0.6
    # Five equal blades: only the fifth angular moment is not zero.
    angle = torch.atan2(*rows["pinwheel"].T.flip(0))
    moments = [torch.polar(torch.ones_like(angle), k * angle).mean().abs() for k in range(1, 6)]
    assert max(moments[:4]) < 0.03
    assert moments[4] > 0.1


def test_csv_with_header_comments_and_blank_lines_is_read(tmp_path: Path) -> None:
    numbers = torch.randn(60, 3, dtype=torch.float64)
    lines = ["# measured", "a,b,c", ""] + [",".join(map(repr, row)) for row in numbers.tolist()]
    assert torch.equal(read_table(_write(tmp_path / "table.csv", lines)), numbers)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_separators_are_recognised(tmp_path: Path, separator: str) -> None:
    path = _write(tmp_path / "table.csv", [separator.join(("1", " 2.5", "-3e2"))] * 3)
    assert read_table(path).tolist() == [[1.0, 2.5, -300.0]] * 3


@pytest.mark.parametrize("dtype", ["float64", "float32", "int16", "uint8"])
def test_npy_of_any_real_dtype_is_read(tmp_path: Path, dtype: str) -> None:
    array = np.arange(12).reshape(6, 2).astype(dtype)
    np.save(tmp_path / "table.npy", array)
    assert read_table(tmp_path / "table.npy").tolist() == array.tolist()


def test_npy_with_one_axis_is_one_column(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.arange(5.0))
    assert read_table(tmp_path / "table.npy").shape == (5, 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,2", "3,x"], r"line 2, column 2: 'x' is not a number"),
        (["a,b", "1,2", "", "3,"], r"line 4, column 2: '' is not a number"),
        (["1,2", "nan,4"], r"line 2, column 1: nan is not finite"),
        (["1,2", "3,-inf"], r"line 2, column 2: -inf is not finite"),
        (["1,2", "3,1e999"], r"line 2, column 2: 1e999 is not finite"),
        (["1,2", "3,1_000"], r"line 2, column 2: '1_000' is not a number"),
        (["1,2", "3"], r"line 2 has 1 columns, the first row has 2"),
        (["a,b"], r"holds no rows"),
        (["# nothing"], r"holds no rows"),
    ],
)
def test_a_bad_csv_is_refused_with_its_place(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_table(_write(tmp_path / "table.csv", lines))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, 2.0], [3.0, np.nan]]), r"row 2, column 2: nan is not finite"),
        (np.array([[np.inf]]), r"row 1, column 1: inf is not finite"),
        (np.array([["a"]]), r"holds <U1, not real numbers"),
        (np.zeros((2, 2), dtype=complex), r"holds complex128"),
        (np.zeros((2, 2), dtype=bool), r"holds bool"),
        (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\)"),
        (np.float64(1.0), r"shape \(\)"),
    ],
)
def test_a_bad_npy_is_refused_with_its_place(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "table.npy", array)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "table.npy")


def test_npy_with_pickled_objects_is_refused_without_running_them(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a readable \.npy file"):
        read_table(tmp_path / "table.npy")


@pytest.mark.parametrize(("suffix", "content"), [("npy", b"garbage"), ("csv", b"\xff\xfe\x00")])
def test_a_corrupt_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"table.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable"):
        datasets.load(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"no such file: .*table\.csv"):
        datasets.load(str(tmp_path / "table.csv"))


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    with pytest.raises(DataNotFoundError, match="did you mean 'pinwheel'"):
        datasets.load("pinwhell")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "table.txt", ["1,2"])
    with pytest.raises(DataError, match=r"unknown kind of file '\.txt'; use one of \.npy, \.csv"):
        datasets.load(str(path))


def test_too_few_rows_are_refused_with_the_number_needed(tmp_path: Path) -> None:
    path = _write(tmp_path / "table.csv", [f"{i},{i * i}" for i in range(MIN_ROWS - 1)])
    with pytest.raises(DataError, match=f"{MIN_ROWS - 1} rows are too few.* {MIN_ROWS}"):
        datasets.load(str(path))
    assert datasets.load(str(_write(path, [f"{i},{i * i}" for i in range(MIN_ROWS)]))).dim == 2


def test_a_constant_column_is_named() -> None:
    rows = torch.randn(60, 3, dtype=torch.float64)
    rows[:, 1] = 4.25
    with pytest.raises(DataError, match=r"column 2 is constant .*value 4\.25"):
        make_dataset("table", rows, seed=0)


def test_rows_without_columns_are_refused() -> None:
    with pytest.raises(DataError, match="no columns"):
        make_dataset("table", torch.zeros(60, 0, dtype=torch.float64), seed=0)
