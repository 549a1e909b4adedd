"""What the parquet formats share: rows read in small batches, row groups written one after the other."""

import bisect
import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import InputError
from ...files import open_plain, read_stored
from ..dataset import PreferenceDataset, PreferencePair
from ..images import read_image_bytes
from .format import IMAGE_FORMATS, OpenImage

_ROWS_AT_ONCE = 32
_ROWS_PER_GROUP = 100  # as Hugging Face writes images


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow, parquet


def parquet_files(path: Path) -> list[Path]:
    """Return a parquet file itself, or those of a folder, sorted.

    Raises:
        InputError: there is none.
    """
    if path.is_dir():
        if files := sorted(path.glob("**/*.parquet")):
            return files
        raise InputError(f"{path}: holds no .parquet file; give the file, or the folder it lies in")
    if not path.is_file():
        raise InputError(f"no such file: {path}; check the name")
    return [path]


def read_rows(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, values by column) of every row; only a few rows are in memory at once.

    Args:
        required, optional: the columns to read; others are left alone.

    Raises:
        InputError: a required column is missing, or the file is damaged.
    """
    _, parquet = _pyarrow()
    for file_path in parquet_files(path):
        with open_plain(file_path, follow_links=True) as file, _readable(file_path):
            # A stream of each column instead of the whole: a row group may hold everything.
            table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            names = table.schema_arrow.names
            if missing := [name for name in required if name not in names]:
                raise InputError(f"{file_path}: has no column {missing[0]!r}; choose the format it is in")
            columns = [*required, *(name for name in optional if name in names)]
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file_path} row {number}", row


class RowGroups:
    """The rows of one or several parquet files by number; at most four row groups are in memory.

    Args:
        path: a file, or a folder of them.
        columns: must be there.
        optional: may be there.

    Raises:
        InputError: a column is missing, or a file is damaged.
    """

    def __init__(self, path: Path, columns: Sequence[str], optional: Sequence[str] = ()):
        _, parquet = _pyarrow()
        self._open_files = contextlib.ExitStack()
        self._groups: list[tuple[Path, Any, int, int]] = []  # (file, its reader, group in it, first row in it)
        self._first_rows: list[int] = []
        self._columns: list[str] = []
        self._read: OrderedDict[int, Any] = OrderedDict()
        total = 0
        for file_path in parquet_files(path):
            file = self._open_files.enter_context(open_plain(file_path, follow_links=True))
            with _readable(file_path):
                table = parquet.ParquetFile(file)
                names = table.schema_arrow.names
                if missing := [name for name in columns if name not in names]:
                    raise InputError(f"{file_path}: has no column {missing[0]!r}; choose the format it is in")
                self._columns = [*columns, *(name for name in optional if name in names)]
                first_in_file = 0
                for group in range(table.num_row_groups):
                    self._groups.append((file_path, table, group, first_in_file))
                    self._first_rows.append(total)
                    num_rows = table.metadata.row_group(group).num_rows
                    total, first_in_file = total + num_rows, first_in_file + num_rows

    def __enter__(self) -> "RowGroups":
        return self

    def __exit__(self, *error: object) -> None:
        self._open_files.close()

    def where(self, index: int) -> str:
        """Return what names a row in an error."""
        group = bisect.bisect_right(self._first_rows, index) - 1
        path, _, _, first_in_file = self._groups[group]
        return f"{path} row {first_in_file + index - self._first_rows[group] + 1}"

    def without(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield all rows without one column, which is not read."""
        columns = [column for column in self._columns if column != name]
        for path, table, group, _ in self._groups:
            with _readable(path):
                yield from table.read_row_group(group, columns=columns).to_pylist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._first_rows, index) - 1
        if group not in self._read:
            path, table, number, _ = self._groups[group]
            with _readable(path):
                self._read[group] = table.read_row_group(number, columns=self._columns)
            if len(self._read) > 4:
                self._read.popitem(last=False)
        self._read.move_to_end(group)
        return self._read[group].slice(index - self._first_rows[group], 1).to_pylist()[0]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception:  # Arrow's own, OSError, and UnicodeDecodeError for damaged names
        raise InputError(f"{path}: is truncated or no parquet file; copy it again") from None


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a column's text.

    Raises:
        InputError: it is something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: column {name!r} holds no text; choose the format it is in")
    return value


def image_of(value: Any, where: str, name: str) -> OpenImage:
    """Return what decodes an image column: bytes, or Hugging Face's {bytes, path} with the bytes inside.

    Raises:
        InputError: there are no bytes.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise InputError(f"{where}: column {name!r} holds no image; its file must be in the parquet itself")

    def read() -> Image.Image:
        return read_image_bytes(data, f"{where} column {name!r}", IMAGE_FORMATS)

    return read


def write_rows(
    path: Path,
    dataset: PreferenceDataset,
    pairs: Sequence[PreferencePair],
    columns: Mapping[str, str],
    make_row: Callable[[int, PreferencePair, bytes, bytes], dict[str, Any]],
) -> None:
    """Write a parquet file, one row group after the other.

    Args:
        columns: name -> type: string, binary, bool, int64, float64, timestamp, or image (Hugging Face's).
        make_row: (number, pair, PNG of the chosen image, PNG of the rejected image) -> values by column.
    """
    pyarrow, parquet = _pyarrow()
    types = {
        "string": pyarrow.string(),
        "binary": pyarrow.binary(),
        "bool": pyarrow.bool_(),
        "int64": pyarrow.int64(),
        "float64": pyarrow.float64(),
        "timestamp": pyarrow.timestamp("us"),
        "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    }
    features = {
        name: {"_type": "Image"} if kind == "image" else {"_type": "Value", "dtype": _HF_TYPES.get(kind, kind)}
        for name, kind in columns.items()
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()], metadata=metadata)
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(pairs), _ROWS_PER_GROUP):
            rows = []
            for number, pair in enumerate(pairs[start : start + _ROWS_PER_GROUP], start=start):
                rows.append(make_row(number, pair, *(read_stored(path) for path in dataset.image_paths(pair))))
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


_HF_TYPES = {"timestamp": "timestamp[us]"}
