"""Snapshots in memory that outlive the trainer: keepers, redundancy between them, and recovery."""
