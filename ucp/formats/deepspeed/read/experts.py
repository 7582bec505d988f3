"""The experts of a DeepSpeed checkpoint: their files, and which ranks hold which.

Sources: ``runtime/engine.py: _save_moe_checkpoint``, ``runtime/zero/stage_1_and_2.py: _configure_moe_settings``. What
is special about experts in the files:

- Their weights as the module has them are not in the model file. Each expert has a file of its own,
  ``layer_{layer}_expert_{number}_mp_rank_00_model_states.pt``. Layers count from 0, and names have the expert's number
  in the whole model. The gate, and the dense expert of a residual layer, are in the model file with the rest.
- An optimizer's param group holds only experts or none (``moe: True, name: ep_size_N``). Its flat buffer is cut over
  the dp / ep ranks with the same experts; ``partition_count`` has that number for each group. The padding is theirs.
  All ranks' files list the group at the same place.
- ``param_shapes`` is the first rank's. It has that rank's experts under their numbers on the rank, which are the same
  on the other ranks.
- At stage 0 the optimizer's state is in ``expp_rank_{rank}_mp_rank_00_optim_states.pt``, one for each expert-parallel
  rank (of the largest such group), with that rank's experts and, again, everything else.
- AutoEP's layers are listed in ``ds_autoep_layers``. Its experts' files have ``{prefix}.w1.{number}`` and so on, one
  row of the stack each. At stage 3 it has no such files.
- Beside tensor parallelism (AutoEP's "folding", ``module_inject/auto_ep_folding.py``; ``moe/layer.py``) experts are
  spread over all ranks in their global order, and not cut. So each tensor-parallel rank's files have some of the
  experts, and those that share an expert's flat buffer may be of several such ranks. An expert's own file has the name
  of one of them; AutoEP's is read only where the expert is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.experts import Expert, Experts, counts, data_ranks, expert_of
from ucp.formats.deepspeed.read.folder import FOLDING, Folder, check_ranks, load
from ucp.formats.deepspeed.read.model_files import ModelFile
from ucp.formats.shared.builder import Builder, Rows
from ucp.geometry import Shape
from ucp.printable import short
from ucp.storage.torch_pt.values import TensorRef

# One rank's optimizer file and the state dict in it.
OptimFile = tuple[Path, Mapping[str, Any]]


@dataclass(frozen=True)
class ExpertFiles:
    """What a checkpoint says of its experts, if it has any.

    totals: the number of experts of each of DeepSpeed's own layers.
    tensors: of experts, by the whole model's names.
    rows: of AutoEP's stacks, by the expert's number, in the order in which they are stacked.
    data_first: as for `data_ranks`.
    optim_ranks: how many expert-parallel ranks have optimizer files of their own (stage 0).
    aliases: other names that AutoEP's routers have, which are in no file.
    optim: the optimizer files of all ranks by their global numbers, if experts are spread over tensor-parallel ranks.
    elsewhere: the experts are read together with another tensor-parallel rank's files.
    """

    path: Path
    experts: Experts = field(default_factory=Experts)
    totals: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    rows: Mapping[str, Mapping[int, TensorRef]] = field(default_factory=dict)
    data_first: bool = False
    optim_ranks: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)
    optim: Mapping[int, OptimFile] | None = None
    elsewhere: bool = False

    @property
    def ep(self) -> int:
        """The number of ranks that experts are spread over; the largest one if layers differ."""
        native = (self.totals.get(layer, 0) // held for layer, held in self.experts.held.items())
        return max([1, self.optim_ranks, *native, *(len(ranks) for ranks in self.experts.stacks.values())])

    def _with(self, model: ModelFile, tensors: Mapping[str, TensorRef]) -> ModelFile:
        buffers = list(model.raw.get("buffer_names") or ())
        patterns = {_pattern(name) for name in buffers}
        buffers += [name for name in tensors if _pattern(name) in patterns and name not in buffers]
        return replace(model, raw={**model.raw, "module": {**model.module, **tensors}, "buffer_names": buffers})

    def shares(
        self, optim: Mapping[int, OptimFile], group: int, shapes: Mapping[str, Shape], count: int
    ) -> list[dict[int, OptimFile]]:
        """The files that the flat buffer of a param group (at stage 3 a subgroup) is cut over, in that order.

        These are all files; for experts they are those of each expert-parallel rank. count: into how many partitions
        the buffer was cut. Raises DamagedCheckpoint if that does not fit the number of experts.
        """
        local = [name for name in shapes if self.experts.has(name)]
        if not local:
            return [dict(optim)]
        if self.elsewhere:
            return []
        optim = optim if self.optim is None else self.optim
        path = optim[0][0]
        if len(local) < len(shapes):
            other = next(name for name in shapes if name not in local)
            raise Unsupported(f"{path}: param group {group} holds both experts ('{local[0]}') and others ('{other}')")
        dp = len(optim)
        ep = dp // count if count else 0
        wrong = [name for name in local if not ep or dp % count or not self._held_over(name, ep)]
        if wrong:
            raise DamagedCheckpoint(
                f"{path}: group {group} was cut into {count} partitions by {dp} ranks, which does not "
                f"fit the experts of '{wrong[0]}' in the model file; files of two runs are mixed"
            )
        return [{i: optim[r] for i, r in enumerate(data_ranks(rank, dp, ep, self.data_first))} for rank in range(ep)]

    def _held_over(self, name: str, ep: int) -> bool:
        if name in self.experts.stacks:
            return len(self.experts.stacks[name]) == ep
        expert = expert_of(name)
        return expert is not None and self.experts.held[expert.layer] * ep == self.totals.get(expert.layer, 0)

    def enter_frozen(self, builder: Builder) -> None:
        """Enter the stacks that are not trained, row by row, from the experts' files."""
        for name, stack in self.stacked.items():
            if name not in builder.parameters:
                builder.add(name, "frozen", [builder.whole(name, "param", stack)])

    @property
    def stacked(self) -> dict[str, Rows]:
        """AutoEP's stacks, row by row from the experts' files. Raises DamagedCheckpoint for rows that make no stack."""
        out = {}
        for name, rows in self.rows.items():
            stack = Rows(tuple(rows.values()))
            for ref in stack.refs:
                if (ref.shape, ref.dtype) != (stack.shape[1:], stack.dtype):
                    raise DamagedCheckpoint(
                        f"{ref.file}: its row of '{name}' has shape {list(ref.shape)} and element type {ref.dtype}, "
                        f"and in another expert's file {list(stack.shape[1:])} and {stack.dtype}; files of two runs "
                        "are mixed"
                    )
            out[name] = stack
        return out

    def of_rank(self, rank: int) -> ExpertFiles:
        """The same with an expert-parallel rank's rows alone, if such ranks are read apart (stage 0)."""
        if not self.optim_ranks or not self.rows:
            return self
        rows = {name: {e: held[e] for e in self.experts.stacks[name][rank]} for name, held in self.rows.items()}
        return replace(self, rows=rows)

    def parts(self, folder: Folder, models: Mapping[int, ModelFile]) -> dict[int, Mapping[int, ModelFile]]:
        """The model files as if the experts' tensors were in them: all in the first one. At stage 0 there is one for
        each expert-parallel rank, with its experts and its optimizer's state.

        Raises DamagedCheckpoint for missing files, Unsupported if layers are spread over different numbers of ranks.
        """
        model = models[0]
        if self.aliases:
            shared = {**self.aliases, **(model.raw.get("shared_params") or {})}
            model = replace(model, raw={**model.raw, "shared_params": shared})
        if not folder.expert_optim:
            return {0: {**models, 0: self._with(model, self.tensors) if self.tensors else model}}
        ep = self.optim_ranks
        check_ranks(
            "expert-parallel optimizer",
            folder.expert_optim,
            ep,
            folder.path,
            "expp_rank_{}_mp_rank_00_optim_states.pt",
            model.path,
        )
        self._check_stacks(ep)
        out: dict[int, Mapping[int, ModelFile]] = {}
        for rank, path in sorted(folder.expert_optim.items()):
            optimizer = load(path, trust=None).get("optimizer")
            _check_groups(path, optimizer, ep)
            mine = {n: ref for n, ref in self.tensors.items() if self._on_rank(n, rank, ep)}
            found = self._with(model, mine)
            out[rank] = {0: replace(found, raw={**found.raw, "optimizer": optimizer})}
        return out

    def _check_stacks(self, ep: int) -> None:
        """Raise DamagedCheckpoint where the rows of stacks do not fit the ranks that have optimizer files."""
        for name, stack in self.experts.stacks.items():
            lost = sorted({e for held in stack for e in held} - self.rows.get(name, {}).keys())
            if lost:
                raise DamagedCheckpoint(
                    f"{self.path}: no file of expert {lost[0]} has its row of '{name}' ('{name}.{lost[0]}')"
                )
            if len(stack) != ep:
                raise DamagedCheckpoint(
                    f"{self.path}: the model file says that {len(stack)} ranks share '{name}', and there are files of "
                    f"{ep} expert-parallel ranks; files are missing or of two runs"
                )

    def _on_rank(self, name: str, rank: int, ep: int) -> bool:
        expert = expert_of(name)
        return expert is not None and expert.number * ep // self.totals[expert.layer] == rank


def _check_groups(path: Path, optimizer: Any, ep: int) -> None:
    """Param groups of experts are named for the number of ranks (``moe/layer.py: expert_group_name``)."""
    inner = optimizer.get("optimizer_state_dict", optimizer) if isinstance(optimizer, Mapping) else {}
    names = sorted({str(group.get("name")) for group in inner.get("param_groups", ()) if group.get("moe")})
    if len(names) > 1:
        raise Unsupported(
            f"{path}: has experts that are spread over different numbers of ranks ({', '.join(names)}); at stage 0 "
            "that is not supported"
        )
    if names and names[0] != f"ep_size_{ep}":
        raise DamagedCheckpoint(
            f"{path}: its experts are of '{names[0]}', but there are files of {ep} expert-parallel ranks; files are "
            "missing or of two runs"
        )


def _pattern(name: str) -> tuple[str, ...]:
    """The name without the expert's number."""
    expert = expert_of(name)
    return (expert.layer, expert.rest) if expert else (name,)


def find_experts(folders: Sequence[Folder], model: ModelFile, slice_: int = 0) -> ExpertFiles:
    """The experts of a stage: of the files of all its tensor-parallel ranks. Most checkpoints have no experts. A
    pipeline's stages have files of their own, which count their layers from 0.

    model: the model file of one of the ranks. slice_: its number; all experts are read with the first one's.

    Raises DamagedCheckpoint for missing or contradicting files, Unsupported for old forms, and for experts of stage 0
    under tensor parallelism or that this cuts, too.
    """
    folder = folders[slice_]
    files = {key: path for one in reversed(folders) for key, path in one.experts.items()}
    totals = model.raw.get("num_experts")
    count = sum(len(f.model) + len(f.optim) + len(f.expert_optim) for f in folders)
    stacks = _stacks(model, count + len(files))
    if totals is None and not files:
        return ExpertFiles(folder.path)
    if len(folders) > 1:
        _check_folded(folders, folder, model, stacks)
    if not isinstance(totals, (list, tuple)):
        raise Unsupported(
            f"{model.path}: 'num_experts' is {short(totals)}, no list; experts of such old files cannot be read"
        )
    extra = [path for (layer, n), path in files.items() if layer >= len(totals) or n >= int(totals[layer])]
    if extra:
        raise DamagedCheckpoint(
            f"{extra[0]}: '{model.path.name}' says that there are {list(totals)} experts; files of two runs are mixed"
        )
    tensors: dict[str, TensorRef] = {}
    rows: dict[str, dict[int, TensorRef]] = {}
    unneeded = _trained_layers(model, stacks) if len(folders) > 1 and stacks else frozenset()
    for layer, total in enumerate(() if slice_ or folder.partitioned_model else totals):
        for number in range(int(total)):
            path = files.get((layer, number))
            if path is None:
                raise DamagedCheckpoint(
                    f"{folder.path}: 'layer_{layer}_expert_{number}_mp_rank_{folder.mp:02d}_model_states.pt' is "
                    f"missing; '{model.path.name}' says that layer {layer} has {total} experts"
                )
            if layer in unneeded:
                continue
            for name, ref in load(path, trust=None).items():
                if name != FOLDING:
                    _enter(path, number, name, ref, stacks, tensors, rows)
    shapes = [*(model.raw.get("param_shapes") or ()), model.raw.get("frozen_param_shapes") or {}]
    held = counts(str(name) for group in shapes for name in group)
    data_first = bool(model.config.get("use_data_before_expert_parallelism"))
    ranks = max(folder.expert_optim, default=-1) + 1
    rows = {name: dict(sorted(held.items())) for name, held in rows.items()}
    experts, aliases = Experts(held, stacks), _router_aliases(model)
    return ExpertFiles(
        folder.path, experts, counts(tensors), tensors, rows, data_first, ranks, aliases, elsewhere=slice_ > 0
    )


def _trained_layers(model: ModelFile, stacks: Mapping[str, Any]) -> frozenset[int]:
    """AutoEP's layers whose experts are all trained: their weights are those of the optimizer files, rounded.

    Under tensor parallelism DeepSpeed 0.19.8 has every rank that holds an expert write its file, at the same time, so
    that now and then such a file is a mixture of two.
    """
    trained = {str(name) for group in model.raw.get("param_shapes") or () for name in group}
    prefixes = {int(layer["moe_layer_id"]): f"{layer['expert_key_prefix']}." for layer in _layers(model)}
    return frozenset(
        number
        for number, prefix in prefixes.items()
        if all(name in trained for name in stacks if name.startswith(prefix))
    )


def _check_folded(folders: Sequence[Folder], folder: Folder, model: ModelFile, stacks: Mapping[str, Any]) -> None:
    """Raise Unsupported for experts under tensor parallelism of which no rule is known that says who holds them. Of
    DeepSpeed's own layers one rank writes each expert's file, unless tensor parallelism cuts it, too."""
    if any(one.expert_optim for one in folders):
        raise Unsupported(
            f"{folder.path}: has experts of stage 0 under tensor parallelism, whose files are not supported; save "
            "through ucp.deepspeed"
        )
    if not stacks and "pp_degree" not in (model.raw.get("checkpoint_parallel_dimensions") or {}):
        raise Unsupported(
            f"{model.path}: does not say whether its ranks were stages or slices ('checkpoint_parallel_dimensions', "
            "since DeepSpeed 0.19), of which both have experts' files with the same names"
        )
    written = [key for one in folders for key in one.experts]
    if not stacks and len(set(written)) < len(written):
        raise Unsupported(
            f"{folder.path}: several tensor-parallel ranks wrote the same experts, so these are cut, too "
            "(enable_expert_tensor_parallelism), which is not supported"
        )
    said = model.raw.get(FOLDING)
    width = said.get("etp_size", 1) if isinstance(said, Mapping) else 1
    if width != 1:
        raise Unsupported(
            f"{model.path}: says that tensor parallelism cuts its experts, too (over {width} ranks), which is not "
            "supported"
        )


def _enter(
    path: Path,
    number: int,
    name: str,
    ref: Any,
    stacks: Mapping[str, Sequence[Sequence[int]]],
    tensors: dict[str, TensorRef],
    rows: dict[str, dict[int, TensorRef]],
) -> None:
    stack, _, last = name.rpartition(".")
    expert = Expert(stack, int(last), "") if stack in stacks and last.isdecimal() else expert_of(name)
    if not isinstance(ref, TensorRef) or expert is None:
        raise Unsupported(f"{path}: '{name}' is no tensor of an expert; what it belongs to is not known")
    if expert.number != number:
        raise DamagedCheckpoint(f"{path}: holds '{name}', which is of another expert; files were renamed or mixed")
    if expert.rest:
        tensors[name] = ref
    else:
        rows.setdefault(stack, {})[number] = ref


def _layers(model: ModelFile) -> Sequence[Mapping[str, Any]]:
    """AutoEP's layers."""
    found: Sequence[Mapping[str, Any]] = model.raw.get("ds_autoep_layers") or model.raw.get("autoep_layers") or ()
    return found


def _router_aliases(model: ModelFile) -> dict[str, str]:
    """Alias -> owner. An AutoEP layer has its router under 'router', and again under the name that the replaced layer
    had for it (``module_inject/auto_ep_layer.py``). The files hold both, and ``shared_params`` does not list them."""
    out: dict[str, str] = {}
    for layer in _layers(model):
        prefix = str(layer["expert_key_prefix"]).removesuffix("experts")
        children: dict[str, set[str]] = {}
        for name in model.module:
            if name.startswith(prefix):
                child, _, rest = name.removeprefix(prefix).partition(".")
                children.setdefault(child, set()).add(rest)
        router = children.pop("router", set())
        trained = {str(name) for group in model.raw.get("param_shapes") or () for name in group}
        for child, rests in children.items():
            names = {f"{prefix}{child}.{rest}": f"{prefix}router.{rest}" for rest in rests}
            if rests == router and not trained.intersection(names):
                out.update(names)
    return out


def _stacks(model: ModelFile, files: int) -> dict[str, list[list[int]]]:
    """AutoEP's stacked tensors, and the experts that each expert-parallel rank's rows belong to.

    files: how many files there are. Every expert-parallel rank wrote at least one.

    ``checkpoint/autoep_affine.py`` gives the placement. Older files have none; then ranks have equally many experts.
    """
    out: dict[str, list[list[int]]] = {}
    for layer in _layers(model):
        count, ep = int(layer["num_experts"]), int(layer["ep_size"])
        if not 0 < ep <= files or not 0 < count <= limits.EXPERTS:
            raise DamagedCheckpoint(
                f"{model.path}: says that '{layer['expert_key_prefix']}' has {count} experts on {ep} ranks, and there "
                f"are {files} files"
            )
        placement = layer.get("expert_placement")
        if placement is None:
            stack = [list(range(rank * (count // ep), (rank + 1) * (count // ep))) for rank in range(ep)]
        else:
            stack = [[int(e) for e in r["experts"]] for r in sorted(placement["ranks"], key=lambda r: r["rank"])]
        found = sorted({e for numbers in stack for e in numbers})
        if found != list(range(count)) or any(len(set(numbers)) < len(numbers) for numbers in stack):
            raise DamagedCheckpoint(
                f"{model.path}: says that the ranks of '{layer['expert_key_prefix']}' have the experts {stack}, which "
                f"are not its {count}: each on one rank at least, and on none twice"
            )
        out.update({f"{layer['expert_key_prefix']}.{w}": stack for w in ("w1", "w2", "w3")})
    return out
