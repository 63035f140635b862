"""The arms of a comparison, as `quantkd evaluate` leaves them: one JSON file a model, checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkd.errors import DataError
from quantkd.report.breakdown import read_bins

_FIRST = ("teacher", "before", "after")  # in the report; others follow by name
_FIDELITY_KEYS = ("tokens", "kl_sum", "ce_sum", "agree")
_OPTIONAL_KEYS = ("reverse_kl_sum", "dense_kl_sum", "dense_reverse_kl_sum", "dense_agree")
_VERDICT_KEYS = ("id", "correct_flexible")  # and correct_strict, where there are two verdicts


@dataclass(frozen=True)
class Arm:
    """One model's evaluation.

    Args:
        name: the file's name, such as "before".
        title: what the report calls it.
        model: the model's name.
        memory_bytes: its memory footprint; None if it was not measured.
        transfer_set_digest: the held-out set of `fidelity`; None if that is missing.
        fidelity: one column of row sums a key of `tokens`, `kl_sum`, `ce_sum`, `agree`, and of what else was measured;
            None if it was not evaluated.
        bins: for "position", "entropy" and "confidence", and the first two of the teacher at hand as "dense_position"
            and "dense_entropy", the lower `edges` and the columns of sums, each (rows, bins); empty if there are none.
        accuracy: for each setting, such as "0-shot", the verdicts in the order of the questions' ids.
        items: for each setting what was asked, and how, as digests; empty in a file of an earlier version.
    """

    name: str
    title: str
    model: str
    memory_bytes: int | None
    transfer_set_digest: str | None
    fidelity: dict[str, list[float]] | None
    bins: dict[str, dict[str, Any]]
    accuracy: dict[str, list[dict[str, Any]]]
    items: dict[str, dict[str, Any]]


def load_arms(folder: Path) -> list[Arm]:
    """Read all arms of a run, and see to it that they were evaluated on the same items."""
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}; expected what `quantkd evaluate --run_dir {folder.parent}` writes. "
            "Evaluate first, or mend the path."
        )
    # Records of answers may lie in the same folder; an arm is a file of its own kind, *.json.
    paths = {path.stem: path for path in sorted(folder.glob("*.json")) if not path.name.endswith(".settings.json")}
    if not paths:
        raise DataError(
            f"{folder} holds no arms; expected files such as teacher.json, before.json and after.json. Write them with "
            f"`quantkd evaluate --arm NAME --run_dir {folder.parent}`."
        )
    order = [*(name for name in _FIRST if name in paths), *(name for name in paths if name not in _FIRST)]
    arms = [_load_arm(paths[name]) for name in order]
    _check_same_items(arms)
    return arms


def _load_arm(path: Path) -> Arm:
    """One arm's file, with everything in it checked."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}. Evaluate this arm again.") from error
    if not isinstance(data, dict) or data.get("arm") != path.stem:
        found = data.get("arm") if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path} says it is the arm {found!r}; expected {path.stem!r}, after the file's name. "
                        "Evaluate this arm again.")  # fmt: skip
    fidelity, found, items = (_read_object(path, data, key) for key in ("fidelity", "accuracy", "items"))
    accuracy = {str(setting): _read_verdicts(path, f"accuracy {setting}", rows) for setting, rows in found.items()}
    if not fidelity and not accuracy:
        raise DataError(f"{path} holds neither fidelity nor accuracy; expected at least one. Evaluate this arm again.")
    columns, bins = None, {}
    if fidelity:
        rows = _read_rows(path, "fidelity", fidelity.get("rows"), _FIDELITY_KEYS)
        keys = (*_FIDELITY_KEYS, *(key for key in _OPTIONAL_KEYS if key in rows[0]))
        rows = _read_rows(path, "fidelity", rows, keys)
        columns = {key: [float(row[key]) for row in rows] for key in keys}
        if min(columns["tokens"]) < 0 or not sum(columns["tokens"]):
            raise DataError(f"{path}, fidelity: the rows hold {sum(columns['tokens']):g} target tokens; expected some. "
                            "Evaluate this arm on rows with answers.")  # fmt: skip
        bins = read_bins(path, fidelity.get("bins") or {}, columns["tokens"])
    memory = data.get("memory_bytes")
    if memory is not None and not (isinstance(memory, int) and memory >= 0):
        raise DataError(f"{path}: expected memory_bytes as a whole number, found {memory!r}. Evaluate this arm again.")
    return Arm(
        name=path.stem,
        title=" ".join(str(data.get("title") or path.stem).split()),
        model=str(data.get("model") or "unknown"),
        memory_bytes=memory,
        transfer_set_digest=data.get("transfer_set_digest") if columns else None,
        fidelity=columns,
        bins=bins,
        accuracy=accuracy,
        items=items,
    )


def _read_object(path: Path, data: dict[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key) or {}
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected {key} as an object, found {found!r:.60}. Evaluate this arm again.")
    return found


def _read_verdicts(path: Path, part: str, rows: Any) -> list[dict[str, Any]]:
    """Verdicts in the order of the ids."""
    read = _read_rows(path, part, rows, _VERDICT_KEYS)
    if "correct_strict" in read[0]:
        read = _read_rows(path, part, rows, (*_VERDICT_KEYS, "correct_strict"))
    keys = [key for key in ("correct_flexible", "correct_strict") if key in read[0]]
    if any(row[key] not in (0, 1) for row in read for key in keys):
        raise DataError(f"{path}, {part}: expected verdicts that are true or false. Evaluate this arm again.")
    if len({row["id"] for row in read}) != len(read):
        raise DataError(f"{path}, {part}: two rows have the same id. Evaluate this arm again.")
    return sorted(read, key=lambda row: row["id"])


def _read_rows(path: Path, part: str, rows: Any, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}, {part}: expected a list of rows, found {rows!r:.60}. Evaluate this arm again.")
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(
            isinstance(row.get(key), (int, float)) and math.isfinite(row[key]) for key in keys
        ):
            raise DataError(
                f"{path}, {part}, row {place} is {row!r:.120}; expected finite numbers for {', '.join(keys)}. "
                "Evaluate this arm again."
            )
    return [dict(row) for row in rows]


def _check_same_items(arms: list[Arm]) -> None:
    """A difference between arms means something only on the same items."""
    with_fidelity = [arm for arm in arms if arm.fidelity is not None]
    for arm in with_fidelity[1:]:
        first = with_fidelity[0]
        assert arm.fidelity is not None and first.fidelity is not None
        if arm.transfer_set_digest != first.transfer_set_digest or arm.fidelity["tokens"] != first.fidelity["tokens"]:
            raise DataError(
                f"Fidelity of {arm.name!r} is over {len(arm.fidelity['tokens'])} rows of the transfer set "
                f"{arm.transfer_set_digest}, that of {first.name!r} over {len(first.fidelity['tokens'])} rows of "
                f"{first.transfer_set_digest}. Evaluate both on the same held-out rows."
            )
        for kind in sorted(arm.bins.keys() & first.bins.keys()):
            if arm.bins[kind]["edges"] != first.bins[kind]["edges"]:
                raise DataError(
                    f"Fidelity by {kind} of {arm.name!r} has the bins {arm.bins[kind]['edges']}, that of "
                    f"{first.name!r} {first.bins[kind]['edges']}. Evaluate both with one version of quantkd."
                )
    for setting in sorted({setting for arm in arms for setting in arm.accuracy}):
        answered = [(arm.name, [row["id"] for row in arm.accuracy[setting]]) for arm in arms if setting in arm.accuracy]
        for name, ids in answered[1:]:
            if ids != answered[0][1]:
                raise DataError(
                    f"{setting} accuracy of {name!r} is over {len(ids)} questions, that of {answered[0][0]!r} over "
                    f"{len(answered[0][1])}, and their ids differ. Evaluate both on the same questions."
                )
        asked = [(arm.name, arm.items[setting]) for arm in arms if setting in arm.accuracy and setting in arm.items]
        for name, items in asked[1:]:
            first_items = asked[0][1]
            differing = sorted(key for key in {*items, *first_items} if items.get(key) != first_items.get(key))
            if differing:
                raise DataError(
                    f"{setting} accuracy of {name!r} and of {asked[0][0]!r} are not over the same: "
                    f"{', '.join(differing)} differ. Evaluate both on the same questions with the same prompts."
                )
