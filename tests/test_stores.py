"""Stores give back what was put in, and leave nothing behind, whatever happens."""

from __future__ import annotations

import gc
import os
import random
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from symplectic_adjoint import ArgumentError
from symplectic_adjoint._errors import StoreError
from symplectic_adjoint.checkpoints import Device, Disk, Host, Place, Rounded
from symplectic_adjoint.checkpoints.rows import SLACK


def places(folder: Path) -> list[Place]:
    return [Device(), Host(), Disk(folder), Disk(folder, ahead=1)]


def sample(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    return [x, x.T, torch.complex(x, -x).conj(), x.to(torch.bfloat16), x[:0], x.sum()]


def held(store: object, key: int, wanted: list[Tensor]) -> bool:
    got = store.get(key)  # type: ignore[attr-defined]
    assert [x.dtype for x in got] == [x.dtype for x in wanted]
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def open_files(folder: Path) -> list[os.stat_result]:
    """Files of this process in a folder, those without a name among them."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{folder}/"):
                found.append(os.stat(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


@pytest.mark.parametrize("number", range(4))
def test_every_exact_store_gives_back_what_was_put_in(number: int, tmp_path: Path) -> None:
    place = places(tmp_path)[number]
    assert place.exact
    store = place.open()
    for key in range(20):
        store.put(key, sample(key))
    for key in range(5, 12):
        store.drop(key)
    for key in range(20, 30):  # into the room that has become free
        store.put(key, sample(key))
    for key in [*range(29, 11, -1), *range(4, -1, -1)]:
        assert held(store, key, sample(key))
        assert held(store, key, sample(key))
        store.drop(key)
    store.put(0, sample(7))
    assert held(store, 0, sample(7))
    store.close()


def test_the_file_is_nobody_elses_and_uses_its_room_again(tmp_path: Path) -> None:
    store = Disk(tmp_path, ahead=2).open()
    for key in range(100):
        store.put(key, [torch.full((1000,), float(key))])
        if key >= 3:
            store.drop(key - 3)
    assert held(store, 98, [torch.full((1000,), 98.0)])
    (file,) = open_files(tmp_path)
    assert stat.S_IMODE(file.st_mode) == 0o600
    assert file.st_uid == os.getuid()
    assert file.st_size <= 5 * 4000
    assert not list(tmp_path.iterdir())
    store.close()
    assert not open_files(tmp_path)


def test_what_is_on_its_way_stays_within_the_number_of_steps_ahead(tmp_path: Path) -> None:
    store = Disk(tmp_path, ahead=3).open()
    for key in range(50):
        store.put(key, sample(key))
        assert len(store.writing) <= 3  # type: ignore[attr-defined]
    for key in reversed(range(50)):
        assert held(store, key, sample(key))
        assert len(store.reading) <= 3  # type: ignore[attr-defined]
        store.drop(key)


def test_a_store_that_nobody_holds_closes_its_file_and_ends_its_thread(tmp_path: Path) -> None:
    store = Disk(tmp_path).open()
    store.put(0, sample(0))
    assert len(open_files(tmp_path)) == 1
    thread = next(t for t in threading.enumerate() if t.name.startswith("checkpoints"))
    del store
    gc.collect()
    assert not open_files(tmp_path)
    assert not thread.is_alive()


KILLED = """
import os, signal, sys, torch
from symplectic_adjoint.checkpoints import Disk
store = Disk(sys.argv[1]).open()
for key in range(20):
    store.put(key, [torch.ones(1000)])
store.get(0)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "raise":
    raise KeyError
"""


@pytest.mark.parametrize(("how", "code"), [("kill", -9), ("raise", 1)])
def test_nothing_is_left_in_the_folder_however_a_process_ends(
    how: str, code: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    store = Disk(tmp_path, ahead=2).open()
    kept = {}

    def fill() -> None:
        for key in range(100):
            kept[key] = [torch.full((1000,), float(key))]
            store.put(key, kept[key])

    with file_size_limit(50_000), pytest.raises(StoreError, match=r"could not be written.*folder"):
        fill()
    assert 12 <= len(kept) <= 16
    for key in reversed(kept):
        assert held(store, key, kept[key])


def test_a_folder_that_cannot_be_used_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no checkpoint file can be made in .*nowhere"):
        Disk(tmp_path / "nowhere").open()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"no checkpoint file can be made in .*file"):
        Disk(tmp_path / "file").open()
    with pytest.raises(ArgumentError, match="at least 1"):
        Disk(tmp_path, ahead=0)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Nothing is read-only to the superuser."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_folder_is_an_error_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with unprivileged(), pytest.raises(StoreError, match="Permission denied"):
        Disk(tmp_path).open()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_rounded_store_says_so_and_errs_by_half_a_unit(dtype: torch.dtype, bits: int) -> None:
    place = Rounded(dtype)
    assert not place.exact
    store = place.open()
    x = sample(0)[0]
    store.put(3, [x, torch.complex(x, x)])
    y, z = store.get(3)
    error = float(((y - x) / x).abs().max())
    assert 0.25 * 2.0**-bits < error <= 2.0**-bits
    assert torch.equal(z, torch.complex(y, y))
    store.drop(3)
    store.close()


def test_numbers_that_float16_cannot_hold_are_refused() -> None:
    store = Rounded(torch.float16).open()
    with pytest.raises(StoreError, match="1e\\+05"):
        store.put(0, [torch.tensor([1e5])])
    with pytest.raises(ArgumentError, match=r"bfloat16 or torch\.float16"):
        Rounded(torch.float32)


def test_equal_tensors_lie_in_rows_that_are_used_again_and_given_back() -> None:
    draw, store, wanted = random.Random(0), Device().open(), dict[int, list[Tensor]]()
    for key in range(4000):
        growing = key // 1000 % 2 == 0
        if wanted and draw.random() < (0.2 if growing else 0.8):
            old = draw.choice(list(wanted))
            assert held(store, old, wanted.pop(old)) is True
            store.drop(old)
        else:
            wanted[key] = [torch.full((3, 5), key + i / 8) for i in range(draw.choice([1, 4]))]
            store.put(key, wanted[key])
        (rows,) = store.rows.values()  # type: ignore[attr-defined]
        used = sum(map(len, wanted.values()))
        assert used <= sum(map(len, rows.pieces)) <= max(used + 1, used * (1 + 1 / (SLACK - 1)))
    assert all(held(store, key, tensors) for key, tensors in wanted.items())


def test_what_a_row_gives_back_is_a_copy_and_lies_aligned() -> None:
    store = Device().open()
    for key in range(200):
        store.put(key, [torch.full((7,), float(key))])
    got = store.get(3)[0]
    assert got.data_ptr() % 64 == 0
    store.drop(3)
    store.put(200, [torch.zeros(7)])
    assert torch.equal(got, torch.full((7,), 3.0))
