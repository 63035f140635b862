"""The teacher pass: from prompts to a transfer set."""

from quantkd.teacher.capture import capture
from quantkd.teacher.loading import load_teacher
from quantkd.teacher.teacher import EncodedPrompt, GenerationSettings, Teacher
from quantkd.teacher.transformers import TransformersTeacher

__all__ = ["EncodedPrompt", "GenerationSettings", "Teacher", "TransformersTeacher", "capture", "load_teacher"]
