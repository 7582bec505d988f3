"""Attackers that stay: bombs, mutations and faults by seed, each refused by an error of ours or without any effect."""
