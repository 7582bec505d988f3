"""Options that several formats take."""

from __future__ import annotations

from ucp.formats.base import FLAG, Option

TRUST_CLIENT_STATE = Option("trust_client_state", FLAG, "run code that SOURCE's client state asks for", default=False)
"""Unpickle classes outside the allow-list, which runs their code."""
