"""The teacher pass: from prompts to a transfer set."""

from quantkd.data.encoding import EncodedPrompt
from quantkd.teacher.loading import load_teacher
from quantkd.teacher.teacher import GenerationSettings, RunSettings, Teacher
from quantkd.teacher.transformers import TransformersTeacher

__all__ = ["EncodedPrompt", "GenerationSettings", "RunSettings", "Teacher", "TransformersTeacher", "load_teacher"]
