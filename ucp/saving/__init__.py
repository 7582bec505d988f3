"""Live training state as a source: ranks write their shares in parallel, and one of them commits."""
