"""Importing this module makes ``deepspeed.initialize`` itself honour ``"ucp": {"enabled": true}``.

For programs that call DeepSpeed themselves (Hugging Face Trainer, Accelerate, Lightning). It replaces one function,
``deepspeed.initialize``, with `ucp.deepspeed.initialize`, for the whole process; without the config key that behaves as
the original. Nothing else in this project changes DeepSpeed.
"""

from __future__ import annotations

import deepspeed

import ucp.deepspeed

deepspeed.initialize = ucp.deepspeed.initialize
