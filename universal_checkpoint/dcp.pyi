"""For type checkers: at run time this is the module `ucp.dcp`."""

from ucp.dcp import *
