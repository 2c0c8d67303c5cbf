"""Files of arrays: HDF5 for others, and mapped from a table that is checked against the file."""

import json

import h5py
import numpy as np
import pytest

from lorascope.arrayfile import map_arrays, read_header, write_arrays
from lorascope.errors import ArtifactError

ARRAYS = {
    "a/values": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a/none": np.zeros((0, 5), np.int64),
    "b": np.array([1, 2, 255], np.uint8),
}


def write(path, header=None):
    write_arrays(path, ARRAYS, header or {"kind": "test"})
    return path


@pytest.mark.parametrize("n_words", [0, 10, 5000])  # the block grows with the header
def test_arrays_come_back_mapped_and_h5py_reads_the_same(tmp_path, n_words):
    words = ["word"] * n_words
    path = write(tmp_path / "a.h5", {"words": words})
    header, arrays = map_arrays(path)
    assert header["words"] == words
    with h5py.File(path) as file:
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array)
            np.testing.assert_array_equal(file[name][()], array)
            assert arrays[name].dtype == array.dtype
            assert not arrays[name].flags.writeable
    again = write(tmp_path / "b.h5", {"words": words})
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"offset": -1},
        {"offset": 1 << 40},
        {"offset": 1.0},
        {"offset": True},
        {"offset": None},
        {"shape": [3, 1 << 60]},
        {"shape": [1 << 61, 1 << 61, 0]},
        {"shape": [-3, -4]},
        {"shape": "34"},
        {"shape": [1] * 99},
        {"dtype": "O"},
        {"dtype": "<f4,<f4"},
        {"dtype": "<f8"},
        {"dtype": 4},
    ],
)
def test_a_table_that_does_not_fit_the_file_is_refused(tmp_path, changed):
    path = write(tmp_path / "a.h5")
    header = read_header(path)
    assert header is not None
    entry = header["files"]["a/values"] | changed
    if changed == {"dtype": "<f8"}:  # twice as long: beyond the end when it is the last one
        entry["offset"] = path.stat().st_size - ARRAYS["a/values"].nbytes
    header["files"]["a/values"] = entry
    line = json.dumps(header).encode() + b"\n"
    whole = path.read_bytes()
    path.write_bytes(line + whole[len(line) :])
    with pytest.raises(ArtifactError, match=r"no type, shape and offset of a/values that fit"):
        map_arrays(path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}\n", b"[]\n", b"{" * 10_000, b"\x89HDF\r\n"])
def test_a_file_without_a_table_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.h5 is damaged, or an older lorascope made it"):
        map_arrays(tmp_path / "a.h5")
    with pytest.raises(ArtifactError, match="cannot read"):
        map_arrays(tmp_path / "none.h5")


def test_every_shorter_file_is_refused(tmp_path):
    path = write(tmp_path / "a.h5")
    whole = path.read_bytes()
    end = max(e["offset"] for e in map_arrays(path)[0]["files"].values())
    for size in (end, end // 2, 600, 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError):
            map_arrays(path)
