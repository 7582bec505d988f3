"""Which nodes protect each other."""

from __future__ import annotations

from collections.abc import Sequence

from ucp.memory.options import Options


def divided(nodes: Sequence[tuple[str, str]], options: Options) -> tuple[list[list[str]], str]:
    """Groups of nodes, with no two nodes of one failure domain in a group. The second result is a warning about nodes
    that nothing protects, or "".

    nodes: (name, domain). Groups are as large as the options allow, and about equally large.
    """
    domains: dict[str, list[str]] = {}
    for name, domain in sorted(set(nodes)):
        domains.setdefault(domain, []).append(name)
    # A round takes one node from each domain that has any left. Each round forms groups of its own.
    groups: list[list[str]] = []
    depth = max(map(len, domains.values()), default=0)
    for k in range(depth):
        row = [members[k] for members in domains.values() if len(members) > k]
        count = 1 if options.group is None else -(-len(row) // options.group)
        groups += [row[len(row) * g // count : len(row) * (g + 1) // count] for g in range(count)]
    alone = [name for group in groups if len(group) <= options.redundancy for name in group]
    if not alone:
        return groups, ""
    return groups, (
        f"{len(alone)} of {len(nodes)} nodes ({', '.join(alone[:4])}) are in groups of no more than "
        f"{options.redundancy} failure domains, and are protected against the end of their trainers only"
    )
