"""For type checkers: at run time this is the module `ucp.errors`."""

from ucp.errors import *
