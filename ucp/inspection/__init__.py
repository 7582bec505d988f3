"""Looking at checkpoints: what is in one, whether it is whole, how two differ, what a resume would move.

Everything works on a `ucp.open`ed checkpoint's catalog, so formats and layouts may be any and may differ. Results are
frozen dataclasses whose ``as_json()`` is what the command line prints with ``--json``; its key ``schema`` names the
schema and its version (``ucp.inspect/1``), which changes only where a field goes or changes its meaning.
"""
