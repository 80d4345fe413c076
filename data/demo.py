"""The built-in demo model: where it lies, and what ``model=demo`` means."""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).resolve().parent / "demo_model"
"""Weights, tokenizer and training record, written by ``recipe=pretrain_demo``."""


def model_path(model: str) -> str:
    """Path or Hugging Face id for a value of ``model=``; demo is the built-in model."""
    return str(MODEL_DIRECTORY) if model == "demo" else model
