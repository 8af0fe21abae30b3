"""Tables in CSV or TSV files."""

import csv
from pathlib import Path


def read(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a table with a header line, row by row; `.tsv` means tabs, else commas.

    Raises:
        ValueError: a column is missing, a row is short, or the text is not UTF-8; says where.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; expected a first line that names "
                    f"{', '.join(columns)}, found {', '.join(reader.fieldnames or ()) or 'an empty file'}"
                )
            for row in reader:
                if any(row[column] is None for column in columns):
                    raise ValueError(f"{path}, line {reader.line_num}: fewer fields than the first line names")
                rows.append(tuple(row[column] for column in columns))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, e.g. iconv -f latin1 -t utf8") from error
    return rows
