"""Importing this module makes ``deepspeed.initialize`` itself honour ``"ucp": {"enabled": true}``.

This is for programs that call DeepSpeed themselves (Hugging Face Trainer, Accelerate, Lightning). It replaces one
function, ``deepspeed.initialize``, with `ucp.deepspeed.initialize_for_others`, for the whole process. Without the
config key that behaves as the original does. Nothing else in this project changes DeepSpeed.

These programs delete the older checkpoint as soon as a save returns, so saves are synchronous here unless the config
says ``"save": {"async": true}``.
"""

from __future__ import annotations

import deepspeed

import ucp.deepspeed

deepspeed.initialize = ucp.deepspeed.initialize_for_others
