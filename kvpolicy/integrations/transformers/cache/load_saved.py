"""A cache from the file that `save` wrote, to go on with."""

from __future__ import annotations

import os

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.budget.plan_parts import read_shared_layers
from kvpolicy.cache import state
from kvpolicy.cache.schedule import UNLIMITED, Fixed
from kvpolicy.cache.state import Tensors
from kvpolicy.cache.store import RaggedStore
from kvpolicy.errors import KVPolicyError, ModelError, PlanError
from kvpolicy.files.fields import Fields, check_json, describe, parse, sequence, text, whole
from kvpolicy.files.regular import check_regular
from kvpolicy.integrations.transformers.cache.budgeted_layer import BudgetedLayer
from kvpolicy.integrations.transformers.cache.build import cache_of
from kvpolicy.integrations.transformers.cache.layer_state import LayerState
from kvpolicy.integrations.transformers.cache.other_layers import unpack_stock
from kvpolicy.integrations.transformers.cache.parallel import rank_and_size
from kvpolicy.integrations.transformers.cache.placement import layer_devices
from kvpolicy.integrations.transformers.cache.ragged_cache import RaggedCache
from kvpolicy.integrations.transformers.cache.recipe import read_recipe
from kvpolicy.integrations.transformers.cache.save import CHECKSUM, FORMAT, KEY, VERSION, crc32, identity
from kvpolicy.integrations.transformers.cache.sharing_layer import SharingLayer
from kvpolicy.integrations.transformers.model.wrappers import unwrapped
from kvpolicy.model.spec import ModelSpec


def load_cache(model: PreTrainedModel, path: str | os.PathLike[str], plan: BudgetPlan | None = None) -> RaggedCache:
    """The cache in the file at `path`, to go on with. Attaches the model.

    It holds what was saved bit by bit. Sums over it run in another order, so the last digits of logits may differ.

    model: the model that filled the cache, loaded again; the same weights, which is not checked
    plan:  the plan of the cache; needed where the budget grows, checked wherever it is given

    Raises, naming the file, `ModelError` for another model or dtype, `PlanError` for a plan that is missing or another,
    `PluginError` for a policy or an allocator that is not installed here, `KVPolicyError` for a file that cannot be
    read, is damaged, or is of another version.
    """
    try:
        fields, tensors = _read(path)
        return _load(unwrapped(model), fields, Tensors(tensors), plan)
    except KVPolicyError as error:
        raise type(error)(f"cache file '{os.fspath(path)}': {error}") from None


def _read(path: str | os.PathLike[str]) -> tuple[Fields, dict[str, Tensor]]:
    """The document and the tensors. Raises `KVPolicyError`."""
    try:
        check_regular(path)
    except KVPolicyError as error:
        raise KVPolicyError(f"it cannot be read: {error}") from None
    try:
        with open(path, "rb"):  # says what safetensors does not
            pass
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise KVPolicyError("it is no cache of kvpolicy, but another safetensors file")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except OSError as error:
        raise KVPolicyError(f"it cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise KVPolicyError(f"it is damaged or no cache of kvpolicy ({error})") from None
    try:
        document = parse(metadata[KEY].encode())
        check_json(document, "")
        fields = Fields(document)
        if fields.raw("format") != FORMAT:
            raise KVPolicyError(f"its format is {describe(fields.raw('format'))}, expected '{FORMAT}'")
        if fields.raw("version") != VERSION or isinstance(fields.raw("version"), bool):
            raise KVPolicyError(
                f"its version is {describe(fields.raw('version'))}, expected {VERSION}: read the text again into a new "
                "cache and save that, or load the file with the kvpolicy that wrote it"
            )
        if fields.raw(CHECKSUM) != crc32({k: v for k, v in document.items() if k != CHECKSUM}, tensors):
            raise KVPolicyError("it is damaged: its checksum is another")
    except PlanError as error:
        raise KVPolicyError(f"it is damaged: {error}") from None
    return fields, tensors


def _load(model: PreTrainedModel, fields: Fields, tensors: Tensors, plan: BudgetPlan | None) -> RaggedCache:
    spec = ModelSpec.from_config(model.config).sharing(dict(read_shared_layers(fields.fields("recipe"))))
    _check_model(model, spec, fields)
    fixed = _read_fixed(tensors, fields, spec) if fields.has("fixed") else None
    recipe = read_recipe(fields.fields("recipe"), plan, needs_plan=fixed is None)
    cache = cache_of(model, recipe, fixed)
    try:
        store = _read_store(model, cache, tensors, fields.fields("store"))
        cache.resume(
            store,
            _read_columns(cache, store, tensors, fields),
            recording=fields.read("recording", state.flag),
            unfed=_read_unfed(model, tensors, store.batch_size) if "unfed" in tensors else None,
            ended=fields.read("ended", text) if fields.has("ended") else None,
        )
        _read_stock(model, cache, store, tensors, fields)
        if "rope_deltas" in tensors:
            cache.state.resume(_read_deltas(tensors, store.batch_size).to(model.device, copy=True))
        tensors.done()
    except PlanError as error:
        raise KVPolicyError(f"it is damaged: {error}") from None
    return cache


def _check_model(model: PreTrainedModel, spec: ModelSpec, fields: Fields) -> None:
    """Raises `ModelError` unless the model can go on with the cache."""
    saved, own = fields.fields("model"), identity(spec, model.dtype)
    for name, what in (("model_type", "type"), ("table_shape", "number of (budgeted layers, KV heads)")):
        if saved.raw(name) != own[name]:
            raise ModelError(f"it was made with a model of {what} {saved.raw(name)}, this one has {own[name]}")
    if saved.raw("config_sha256") != own["config_sha256"]:
        raise ModelError(
            f"it was made with another model: the type '{spec.model_type}' and the number of heads are the same, but "
            "the configurations differ (config_sha256)"
        )
    if saved.raw("dtype") != own["dtype"]:
        raise ModelError(
            f"its keys and values are {saved.raw('dtype')}, the model is {own['dtype']}, and nothing is rounded: load "
            f"the model with dtype=torch.{saved.raw('dtype')}"
        )
    first, count = state.heads(fields.fields("store"))
    rank, size = rank_and_size(model, spec)
    if (first, count * size) != (rank * count, spec.num_kv_heads):
        raise ModelError(
            f"it holds {count} KV heads from head {first} on, but this process needs {spec.num_kv_heads // size} from "
            f"{rank * (spec.num_kv_heads // size)} on: each tensor-parallel process loads the file that the process of "
            "its rank saved, with as many ranks"
        )


def _read_fixed(tensors: Tensors, fields: Fields, spec: ModelSpec) -> Fixed:
    table = tensors.take("fixed", torch.int64, spec.table_shape).clone()
    if int(table.min()) < 0 or int(table.max()) > UNLIMITED:
        raise KVPolicyError(f"'fixed' holds capacities from {int(table.min())} to {int(table.max())}")
    own = fields.fields("fixed")
    entries = own.raw("asked")
    if entries is not None and (isinstance(entries, bool) or not isinstance(entries, int) or entries < 0):
        raise KVPolicyError(f"{own.path('asked')} is {describe(entries)}, expected a whole number or null")
    return Fixed(table, entries)


def _read_unfed(model: PreTrainedModel, tensors: Tensors, batch_size: int) -> Tensor:
    """Tokens that the model's embedding has. Raises `KVPolicyError` for others."""
    ids, rows = tensors.take("unfed", torch.int64, (batch_size, None)), len(model.get_input_embeddings().weight)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise KVPolicyError(f"'unfed' holds ids outside 0 to {rows - 1}")
    return ids.clone()


def _read_deltas(tensors: Tensors, batch_size: int) -> Tensor:
    deltas = tensors.take("rope_deltas", torch.int64, (None, 1))
    if not len(deltas) or batch_size % len(deltas):
        raise KVPolicyError(f"'rope_deltas' is for {len(deltas)} rows, the store holds {batch_size}")
    return deltas


def _read_store(model: PreTrainedModel, cache: RaggedCache, tensors: Tensors, fields: Fields) -> RaggedStore:
    store = cache.make_store(state.batch_size(fields), state.heads(fields)[1])
    devices = layer_devices(model, cache.spec)
    state.unpack(store, tensors, fields, model.dtype, [devices[index] for index in cache.spec.budgeted_layers])
    if any(layer is None for layer in store.layers):
        raise KVPolicyError("a layer is missing")
    return store


def _read_columns(cache: RaggedCache, store: RaggedStore, tensors: Tensors, fields: Fields) -> LayerState:
    """That of every budgeted layer."""
    columns, holes = (fields.read(name, sequence, len(cache.budgeted)) for name in ("columns", "has_holes"))
    least = int(store.seen.max())
    columns = [whole(value, f"columns[{row}]", least) for row, value in enumerate(columns)]
    flags = [state.flag(value, f"has_holes[{row}]") for row, value in enumerate(holes)]
    if len(set(columns)) > 1 or len(set(flags)) > 1:
        raise KVPolicyError(f"its layers have seen different numbers of columns: {columns}, or padding: {flags}")
    filled = None
    if flags[0]:
        filled = tensors.take("filled", torch.bool, (store.batch_size, columns[0])).clone()
        if not torch.equal(filled.sum(1), store.seen):
            raise KVPolicyError(f"'filled' tells of {filled.sum(1).tolist()} tokens, seen are {store.seen.tolist()}")
    return LayerState(columns[0], filled)


def _read_stock(
    model: PreTrainedModel, cache: RaggedCache, store: RaggedStore, tensors: Tensors, fields: Fields
) -> None:
    saved, version = fields.read("stock", sequence), fields.fields("made_by").read("transformers", text)
    if len(saved) != len(cache.layers):
        raise ModelError(
            f"it was saved under transformers {version} with {len(saved)} layers, but transformers "
            f"{transformers.__version__} keeps {len(cache.layers)} for this model"
        )
    shares = cache.spec.num_kv_heads // store.num_heads
    devices, columns = layer_devices(model, cache.spec), cache.budgeted[0].columns
    for index, (layer, values) in enumerate(zip(cache.layers, saved, strict=True)):
        if isinstance(layer, BudgetedLayer | SharingLayer) != (values is None):
            raise KVPolicyError(f"layer {index} is budgeted in the file or in the model, but not in both")
        if values is not None:
            heads = cache.spec.layers[index].num_kv_heads // shares
            most = UNLIMITED if cache.spec.layers[index].kind == "linear" else columns  # an image's length is its own
            shape = (store.batch_size, heads, most)
            unpack_stock(layer, Fields(values, f"stock[{index}]"), tensors, devices[index], model.dtype, shape)
            if getattr(layer, "is_sliding", False) and layer.get_seq_length() != columns:
                raise KVPolicyError(f"layer {index} has seen {layer.get_seq_length()} columns, others {columns}")
