"""Live training state as a source: the ranks write their shares in parallel, and one of them commits."""
