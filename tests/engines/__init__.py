"""Real DeepSpeed engines on several ranks, and the truth about what they hold, for tests."""
