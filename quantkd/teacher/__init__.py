"""The teacher pass: from prompts to a transfer set."""

from quantkd.teacher.capture import capture, load_teacher
from quantkd.teacher.transformers import GenerationSettings, TransformersTeacher

__all__ = ["GenerationSettings", "TransformersTeacher", "capture", "load_teacher"]
