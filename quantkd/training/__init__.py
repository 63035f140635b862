"""The trainer, its arguments, and what prepares a student for it."""
