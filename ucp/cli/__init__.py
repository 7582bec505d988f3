"""The command line. Each command is a thin skin over a function of the library, which a Python caller has too."""
