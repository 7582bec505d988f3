"""For type checkers: at run time this is the module `ucp.elastic`."""

from ucp.elastic import *
