"""What a capture's plan says of the teacher, and what the capture will cost."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list

from quantkd.data.encoding import read_date
from quantkd.errors import ConfigError
from quantkd.hardware import process_state
from quantkd.names import public_name
from quantkd.teacher.filters import Filter
from quantkd.teacher.teacher import Teacher
from quantkd.transfer_set import Plan, estimate_bytes
from quantkd.transfer_set.fingerprint import compute_fingerprint
from quantkd.transfer_set.index import INDEX_NAME, PLAN_NAME, read_begun_plan
from quantkd.transfer_set.rules import storage_rule_to_dict


def find_date(folder: Path) -> str:
    """The date that the prompts of a capture are rendered at: that of the plan on disk, else today's."""
    plan = read_begun_plan(folder) if process_state().is_main_process else None
    found = read_date(plan and plan.generation.get("date"), f"The plan in {folder}")
    return str(broadcast_object_list([found])[0])


def describe_teacher(
    teacher: Teacher, filters: Sequence[Filter], *, responses: Literal["generate", "given"], **generation: Any
) -> dict[str, Any]:
    """The fields of a `Plan` that do not depend on the prompts; `generation` says how these are rendered."""
    settings = teacher.settings
    generation["seed"] = settings.seed
    if responses == "generate":
        generation |= {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.do_sample}
        if settings.do_sample:
            generation["temperature"] = settings.generation_temperature
            generation |= {"top_p": settings.top_p, "top_k": settings.top_k}
    if settings.num_samples > 1:
        generation["num_samples"] = settings.num_samples
    return {
        "teacher_name": public_name(teacher.name),
        "teacher_revision": teacher.revision,
        "teacher_dtype": teacher.dtype,
        "tokenizer_fingerprint": compute_fingerprint(teacher.tokenizer),
        "vocab_size": teacher.vocab_size,
        "storage": storage_rule_to_dict(teacher.rule),
        "temperatures": teacher.temperatures,
        "responses": responses,
        "generation": generation,
        "extra": {**teacher.describe(), **({"filters": [each.describe() for each in filters]} if filters else {})},
    }


@dataclass(frozen=True)
class CaptureEstimate:
    """What a capture will do and cost, known before anything is written."""

    plan: Plan
    folder: Path
    prompt_tokens: int
    response_tokens: int  # at most, unless `is_exact`
    is_exact: bool  # the answers are given

    def __post_init__(self) -> None:
        responses = self.response_tokens if self.is_exact else self.plan.num_prompts
        least = estimate_bytes(self.plan, self.prompt_tokens, responses)
        begun = (self.folder / PLAN_NAME).exists() or (self.folder / INDEX_NAME).exists()
        if not begun and least > 1.2 * self.free_bytes:  # the estimate may be a fifth off
            raise ConfigError(
                f"The set needs at least {least} bytes, and {self.free_bytes} are free at {self.folder}. Choose "
                "another disk, fewer prompts, or a storage rule that keeps fewer entries."
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of the set; an upper bound where the tokens are one."""
        return estimate_bytes(self.plan, self.prompt_tokens, self.response_tokens)

    @property
    def free_bytes(self) -> int:
        """Bytes free on its disk."""
        folder = self.folder.absolute()
        return shutil.disk_usage(next(part for part in (folder, *folder.parents) if part.exists())).free
