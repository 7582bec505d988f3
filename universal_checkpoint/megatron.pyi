"""For type checkers: at run time this is the module `ucp.megatron`."""

from ucp.megatron import *
