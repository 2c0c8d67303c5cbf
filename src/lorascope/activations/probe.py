"""Read foreign HDF5 files once, in a process that may crash.

libhdf5 can crash on a damaged file, and the published scripts write HDF5. So `published` starts
this program, which reads every file completely before lorascope opens one. It takes a JSON list of
paths from stdin and prints one line of JSON for each. If it dies, the first file without a line is
the damaged one. It imports nothing from lorascope, so that it starts fast.
"""

import json
import sys
from pathlib import Path
from typing import Any

import h5py

_MOST = 1100  # bytes that gzip can expand one byte to; a file that claims more is damaged


def describe(path: Path) -> dict[str, Any]:
    """Return the shape of `activations` and the attribute `adapter_types`, or an `error`."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not isinstance(file.get("activations", getlink=True), h5py.HardLink):
                return {"error": "it has no array activations of its own"}
            data = file["activations"]
            if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
                return {"error": "activations is no array of its own"}
            if data.dtype.kind != "f" or data.ndim != 3:
                return {"error": f"activations has type {data.dtype} and {data.ndim} axes"}
            if data.nbytes > _MOST * (path.stat().st_size + 4096):
                return {"error": f"activations has {data.nbytes} bytes, more than fit the file"}
            data[()]
            types = file.attrs.get("adapter_types")
            named = None
            if types is not None:
                named = [t.decode() if isinstance(t, bytes) else str(t) for t in types]
            return {"shape": list(data.shape), "adapter_types": named}
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        return {"error": str(error)}


if __name__ == "__main__":
    for name in json.load(sys.stdin):
        print(json.dumps(describe(Path(name))), flush=True)
