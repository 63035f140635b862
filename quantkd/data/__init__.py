"""Prompts and the two word-problem sets: any JSONL or `datasets` name, GSM8K, and a built-in generator."""
