"""Records that belong together, by a column or by their names: frames of a video, tiles of a slide, one patient."""

import logging
import re
from typing import Any

import numpy as np

from data2vec_train.data.identity import hash_of
from data2vec_train.data.sources.files import Source
from data2vec_train.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def group(source: Source, *, column: str | None, pattern: str | None) -> None:
    """Put the records of `source` into groups (`Source.grouped`); a group is held out as a whole or not at all.

    A record without a value, or whose name does not match, is a group of its own; the number of these is logged.

    Args:
        source: the records.
        column: records with the same value are a group.
        pattern: regular expression, searched in the name of each record, relative to the data folder. Records with the
            same first capture group (the same match, if the pattern has none) are a group.

    Raises:
        ConfigError: there is no such column.
        DataError: no record has a value, or no name matches.
    """
    if column is None and pattern is None:
        return
    if column is not None:
        setting, values = f"data.group_column={column}", _in_column(source, column)
    else:
        setting, values = f"data.group_pattern={pattern}", _in_names(source, pattern)
    alone = [row for row, value in enumerate(values) if value is None]
    if len(alone) == len(values):
        what = "no record has a value" if column is not None else f"no name matches, such as {source.name_of(0)}"
        raise DataError(f"{setting}: {what}")
    grouped = source.hashes()
    hashes = {value: hash_of(f"group {value}".encode("utf-8", "surrogatepass")) for value in set(values)}
    known = np.array([value is not None for value in values])
    grouped[known] = np.fromiter((hashes[value] for value in values if value is not None), dtype=np.uint64)
    source.grouped = grouped
    log.info("%s: %d records in %d groups", setting, len(values) - len(alone), len(hashes) - bool(alone))
    if alone:
        first = source.name_of(alone[0])
        log.warning(
            "%s: %d records are in no group, such as %s; each is a group of its own", setting, len(alone), first
        )


def _in_names(source: Source, pattern: str) -> list[str | None]:
    expression = re.compile(pattern)
    matches = (expression.search(name) for name in source.names())
    # An empty match counts as none: every name has one.
    return [match[expression.groups] or None if match else None for match in matches]


def _in_column(source: Source, column: str) -> list[str | None]:
    try:
        values: list[Any] = source.column(column)
    except KeyError:
        raise ConfigError(f"data.group_column={column}: these records have no such column") from None
    odd = next((value for value in values if not isinstance(value, (str, int, float, type(None)))), None)
    if odd is not None:
        raise DataError(f"data.group_column={column} holds {str(odd)[:60]!r}; expected texts or numbers")
    # NaN stands for an empty cell of a table.
    return [None if value is None or value == "" or value != value else str(value) for value in values]
