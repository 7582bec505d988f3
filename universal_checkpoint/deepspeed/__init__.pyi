"""For type checkers: at run time this is the module `ucp.deepspeed`."""

from ucp.deepspeed import *
