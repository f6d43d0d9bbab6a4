"""Rows of a data file: JSONL, a JSON array, CSV (all three may be packed by gzip), or parquet."""

import csv
import json
import re
from pathlib import Path

from system.errors import UserError
from system.files import MAX_LINES, fit, opened, raw_lines, read_lines, unpacked

BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand before an array: a byte-order mark, white space
GAP = re.compile(r"[\s,]*")  # between the items of an array
MAX_ROWS = 10**7  # of a parquet file, where equal rows take no room


def data_rows(path: Path):
    """Yield (row, where it is) of a data file; UserError if it cannot be read. What it is, its
    first bytes say; CSV is known by its name."""
    with unpacked(path) as file:
        beginning = file.read(4096).lstrip(BLANK)
    if beginning[:4] == b"PAR1":
        return parquet_rows(path)
    if ".csv" in path.suffixes:
        return csv_rows(path)
    return array_rows(path) if beginning[:1] == b"[" else read_lines(path)


def array_rows(path):
    """Yield the objects of a JSON array, one at a time: (dict, "PATH, item N")."""
    with unpacked(path) as file:
        data = file.read(MAX_LINES + 1)
    if len(data) > MAX_LINES:
        raise UserError(f"{path} is too long for the memory: give JSONL, which is read by lines")
    decode = json.JSONDecoder().raw_decode
    number = 1
    try:
        text = data.decode("utf-8-sig")
        place = GAP.match(text, text.index("[") + 1).end()
        while text[place] != "]":
            row, place = decode(text, place)
            yield fit(row), f"{path}, item {number}"
            place = GAP.match(text, place).end()
            number += 1
    except (ValueError, IndexError, RecursionError):  # IndexError: the text ends first
        where = f"{path}, item {number}"
        raise UserError(f"{where} is damaged: it is no JSON object in UTF-8, so mend it") from None


def csv_rows(path):
    """Yield the rows of a CSV file by the names in its first line: (dict, "PATH, line N")."""
    rows = csv.DictReader((line.decode("utf-8-sig") for line, _ in raw_lines(path)), strict=True)
    try:
        for row in rows:
            if None in row:
                raise ValueError("more fields than names in the first line")
            yield row, f"{path}, line {rows.line_num}"
    except (ValueError, csv.Error) as error:
        where = f"{path}, after line {rows.line_num - 1}"
        raise UserError(f"{where}: no CSV in UTF-8 ({error}): save it again") from None


def parquet_rows(path):
    """Yield the rows of a parquet file, of which a thousand are unpacked at a time: (dict, "PATH,
    row N")."""
    try:
        from pyarrow.parquet import ParquetFile  # optional, and for this only
    except ImportError:
        raise UserError(f"{path.name}: pip install pyarrow, or give a JSONL file") from None
    number = 0
    try:
        with opened(path) as file:
            table = ParquetFile(file)
            about = table.metadata
            sizes = [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
            if about.num_rows > MAX_ROWS or sum(sizes) > MAX_LINES:
                raise ValueError("it could fill the memory")
            for batch in table.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except Exception as error:  # several kinds
        raise UserError(f"{path} is damaged ({error}): get it again") from None
