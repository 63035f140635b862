"""Adding rows to a finished set: new shards behind the old ones, which keep their bytes, and a new index.

The rows to be added are first written as a set of their own in the subfolder `extension`. When that is complete, its
shards are moved behind the old ones and the index is replaced in one rename. Until then the folder's index knows only
the old shards, so a crash at any moment leaves the old set or the new one, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkd.errors import TransferSetError
from quantkd.files import FileLock, FileSystem, write_file
from quantkd.transfer_set.codec import Codec
from quantkd.transfer_set.index import INDEX_NAME, Index, read_index
from quantkd.transfer_set.plan import MAX_SHARDS, Plan
from quantkd.transfer_set.shard import shard_bytes, shard_name
from quantkd.transfer_set.writer import COMMIT_LOCK, LOCK_TIMEOUT_SECONDS, WRITER_LOCK

EXTENSION_FOLDER = "extension"
_PASSING = ("segments", "first_row")


def differing_fields(base: Plan, added: Plan) -> list[str]:
    """In what the plan of added rows differs from the finished set's, prompts apart."""

    def common(plan: Plan) -> Plan:
        extra = {key: value for key, value in plan.extra.items() if key not in _PASSING}
        return replace(plan, num_prompts=1, prompts_digest="0" * 64, extra=extra)

    return common(base).differences(common(added))


def extended_plan(base: Plan, added: Plan) -> Plan:
    """The plan of both together. The old set's last shard stays as it is, so some prompt numbers stay unused."""
    first_row = base.num_shards * base.rows_per_shard
    differences = differing_fields(base, added)
    if differences or added.extra.get("first_row") != first_row:
        raise TransferSetError(
            "The rows cannot be added: their plan differs from the set's in "
            f"{', '.join(differences or ['first_row'])}. Ask for the same teacher and settings, or "
            "capture another set and join them with `concatenate`."
        )
    if base.num_shards + added.num_shards > MAX_SHARDS:
        raise TransferSetError(
            f"{base.num_shards} and {added.num_shards} shards are more than the {MAX_SHARDS} of one set. Capture "
            "another set, and join them with `concatenate`."
        )
    segments = [*_segments(base), {"num_prompts": added.num_prompts, "prompts_digest": added.prompts_digest}]
    digest = hashlib.sha256((base.prompts_digest + added.prompts_digest).encode()).hexdigest()
    return replace(
        base,
        num_prompts=first_row + added.num_prompts,
        prompts_digest=digest,
        extra={**base.extra, "segments": segments},
    )


def is_last_segment(base: Plan, added: Plan) -> bool:
    """Whether a set was last extended by these very prompts, as when a command is given twice."""
    return "segments" in base.extra and base.extra["segments"][-1] == _segments(added)[0]


def count_prompts(plan: Plan) -> int:
    """The prompts of a plan, without the numbers that an extension left unused."""
    segments = plan.extra.get("segments")
    if not isinstance(segments, list):
        return plan.num_prompts
    counts = [segment.get("num_prompts") if isinstance(segment, dict) else None for segment in segments]
    total = sum(count for count in counts if isinstance(count, int))
    return total if 1 <= total <= plan.num_prompts else plan.num_prompts  # `extra` is unchecked: a stranger's set


def merge_extension(path: str | Path, filesystem: FileSystem | None = None) -> str:
    """Take the finished rows of the subfolder `extension` into the set. Run again after a crash, it goes on."""
    folder, disk = Path(path), filesystem or FileSystem()
    staging = folder / EXTENSION_FOLDER
    try:
        with FileLock(folder / COMMIT_LOCK) as lock:
            if not lock.wait(LOCK_TIMEOUT_SECONDS):
                raise TransferSetError(f"Another process keeps {lock.path} locked. Stop it, and run the command again.")
            base = read_index(folder)
            if (staging / INDEX_NAME).exists():
                base = _merge(folder, staging, base, disk)
            elif staging.exists():
                _remove_emptied(staging)
            lock.release(remove=True)
    except OSError as error:
        raise TransferSetError(
            f"Could not extend the transfer set at {folder}: {error}. It is as it was: mend the cause, then run the "
            "same command again."
        ) from error
    return base.digest()


def _merge(folder: Path, staging: Path, base: Index, disk: FileSystem) -> Index:
    added = read_index(staging)
    if not is_last_segment(base.plan, added.plan) or added.plan.extra.get("first_row") == _next_row(base.plan):
        plan = extended_plan(base.plan, added.plan)
        codec = Codec(plan)
        for shard, record in enumerate(added.shards):
            source, target = staging / shard_name(shard), folder / shard_name(base.plan.num_shards + shard)
            if source.exists():
                disk.rename(source, target)
                disk.reach("extension:moved")
            if os.stat(target).st_size != shard_bytes(codec, record.size):
                raise TransferSetError(
                    f"{target} has another size than its record promises. Remove {staging} and extend anew."
                )
        disk.sync(folder)
        disk.reach("extension:folder-synced")
        counters = Counter(base.counters)
        counters.update(added.counters)
        base = Index(plan, base.shards + added.shards, dict(counters))
        write_file(folder / INDEX_NAME, base.to_bytes(), filesystem=disk, what="index")
    disk.reach("extension:indexed")
    with FileLock(staging / WRITER_LOCK) as writers:
        # Others that joined may still look for the finished index in there.
        if not writers.wait(LOCK_TIMEOUT_SECONDS):
            raise TransferSetError(
                f"Another writer is still at work on {staging}. Run the command again when it ended."
            )
        for entry in sorted(os.scandir(staging), key=lambda entry: entry.name == INDEX_NAME):  # the index last
            disk.unlink(staging / entry.name)
        disk.reach("extension:emptied")
    staging.rmdir()
    return base


def _remove_emptied(staging: Path) -> None:
    """What a kill between the last file and its folder leaves; the index went last, so anything else is unfinished."""
    left = sorted(entry.name for entry in os.scandir(staging))
    if left:
        raise TransferSetError(
            f"The extension at {staging} is not finished: it holds {', '.join(left[:5])} and no index. Run the command "
            "that began it again."
        )
    staging.rmdir()


def _next_row(plan: Plan) -> int:
    return plan.num_shards * plan.rows_per_shard


def _segments(plan: Plan) -> list[dict[str, Any]]:
    own = [{"num_prompts": plan.num_prompts, "prompts_digest": plan.prompts_digest}]
    segments: list[dict[str, Any]] = plan.extra.get("segments", own)
    return segments
