"""What is left of a universal checkpoint that lost some of its files, by its manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ucp.catalog import Catalog, ParameterInfo
from ucp.errors import DamagedCheckpoint
from ucp.formats.nouns import Remains
from ucp.formats.shared.malformed import malformed
from ucp.formats.universal import manifest, schema, training
from ucp.formats.universal.salvage import missing_files


def remains(folder: Path, *, trust_paths: bool = False) -> Remains | None:
    """What is left; None if all files are there. Raises what reading the manifest raises."""
    path = str(folder / manifest.NAME)
    body = manifest.load(path)
    with malformed(folder / manifest.NAME, "'files'"):
        missing = missing_files(folder, body)
    if not missing:
        return None
    state = next((name for name in missing if training.is_tensors_file(os.path.basename(name))), None)
    if state is not None:
        raise DamagedCheckpoint(f"{folder}/{state}: {missing[state]}, and has the training state's tensors")
    whole = schema.decode(path, body, complete=False, trust_paths=trust_paths, absent=set(missing))
    gone = {k for k, name in enumerate(body["files"]["path"]) if name in missing}
    tensors = {key: t for key, t in whole.tensors.items() if not gone.intersection(t.blocks.buffers.tolist())}
    lost, stateless = {}, []
    parameters: dict[str, ParameterInfo] = {}
    for name, info in whole.parameters.items():
        if all((name, state) in tensors for state in info.states):
            parameters[name] = info
        elif (name, "param") in tensors:
            stateless.append(name)
            parameters[name] = replace(info, states={"param": info.states["param"]}, scalars={})
        else:
            lost[name] = info
    kept = {
        key: tensor for key, tensor in tensors.items() if key[0] in parameters and key[1] in parameters[key[0]].states
    }
    digests = {k: table for k, table in whole.chunk_digests.items() if k not in gone}
    catalog = replace(whole, parameters=parameters, tensors=kept, chunk_digests=digests)
    _without(catalog, gone).check()
    files = tuple((f"{folder}/{name}", text) for name, text in missing.items())
    return Remains(_without(catalog, gone), files, lost, (), frozenset(stateless))


def _without(catalog: Catalog, gone: set[int]) -> Catalog:
    """The catalog without these files, which none of its tensors lies in."""
    index: Mapping[int, int] = {
        old: new for new, old in enumerate(k for k in range(len(catalog.files)) if k not in gone)
    }
    tensors = {}
    for key, tensor in catalog.tensors.items():
        buffers = tensor.blocks.buffers.copy()
        buffers[:] = [index[k] for k in buffers.tolist()]
        tensors[key] = replace(tensor, blocks=replace(tensor.blocks, buffers=buffers))
    return replace(
        catalog,
        files=tuple(file for k, file in enumerate(catalog.files) if k not in gone),
        tensors=tensors,
        chunk_digests={index[k]: table for k, table in catalog.chunk_digests.items()},
    )
