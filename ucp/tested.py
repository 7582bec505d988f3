"""What the tests have run with; ``tests/README.md`` has the table, made by the runs themselves."""

from __future__ import annotations

from ucp.printable import line

TESTED = {
    "deepspeed": ("0.15.4", "0.16.9", "0.17.6", "0.18.9", "0.19.8"),
    "torch": ("2.6.0", "2.13.0"),
}


def does_not_import(error: Exception) -> str:
    """Why DeepSpeed is not there: a release may be too old for the torch beside it."""
    from importlib.metadata import PackageNotFoundError, version  # takes longer to import than this is often needed

    if isinstance(error, ModuleNotFoundError) and error.name == "deepspeed":
        return "ucp.deepspeed needs DeepSpeed, which is not installed: pip install 'universal-checkpoint[deepspeed]'"
    found = {}
    for package in TESTED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "of an unknown version"
    why = f"{type(error).__name__}: {line(str(error))}"
    return (
        f"DeepSpeed {found['deepspeed']} does not import beside torch {found['torch']} ({why}); tested are DeepSpeed "
        f"{', '.join(TESTED['deepspeed'])} with torch {', '.join(TESTED['torch'])}: install one"
    )
