"""For type checkers: at run time this is the module `ucp.deepspeed.auto`."""
