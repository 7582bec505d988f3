"""Laying out DeepSpeed's files: native checkpoints of any layout, and its universal folder."""
