"""Where vLLM is told: its configuration, the making of an attention layer, and what the layer says of its cache."""

from __future__ import annotations

import functools
from typing import Any

import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention.attention import Attention

from kvpolicy import BudgetError
from kvpolicy_vllm import refusals, report
from kvpolicy_vllm.serving import Serving
from kvpolicy_vllm.settings import KEY, Settings

TRIED = ("0.26", "0.27", "0.32")
"""Minor versions of vLLM that the tests have run on."""


def install() -> None:
    """Idempotent. Without the key in the additional config each hook passes on what it was given."""
    if not hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        EngineArgs.create_engine_config = _configured(EngineArgs.create_engine_config)
    if not hasattr(Attention.__init__, "__wrapped__"):
        Attention.__init__ = _budgeted(Attention.__init__)
        Attention.get_kv_cache_spec = _described(Attention.get_kv_cache_spec)


def _configured(create: Any) -> Any:
    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = Settings.read(self.additional_config)
        if settings is None:
            return create(self, *args, **kwargs)
        if not vllm.__version__.startswith(TRIED):
            raise BudgetError(f"this kvpolicy-vllm was made for vLLM {', '.join(TRIED)}, not {vllm.__version__}")
        if self.enable_prefix_caching is None:
            self.enable_prefix_caching = False
        config = create(self, *args, **kwargs)
        refusals.check(config)
        model = config.model_config
        serving = Serving.resolve(
            settings, model.hf_text_config, model.max_model_len, config.parallel_config.tensor_parallel_size,
            config.cache_config.block_size,
        )  # fmt: skip
        config.additional_config = {**config.additional_config, KEY: serving.to_json()}
        report.start(serving, config)
        return config

    return create_engine_config


def _budgeted(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config()
        serving = Serving.of(config)
        if serving is None or (serving.window_block and kwargs.get("per_layer_sliding_window") is not None):
            init(self, *args, **kwargs)
            return
        from vllm.distributed import get_tensor_model_parallel_rank
        from vllm.model_executor.models.utils import extract_layer_index

        from kvpolicy_vllm.backend import BlockBackend

        init(self, *args, **{**kwargs, "attn_backend": BlockBackend})
        rank, size = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
        self.impl.assign(serving, serving.layers.index(extract_layer_index(self.layer_name)), rank, size)

    return __init__


def _described(describe: Any) -> Any:
    @functools.wraps(describe)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        if Serving.of(vllm_config) is None:
            return describe(self, vllm_config)
        from kvpolicy_vllm import cache_spec
        from kvpolicy_vllm.backend import BlockImpl

        if not isinstance(self.impl, BlockImpl):
            return describe(self, vllm_config)
        cache_spec.register()
        return cache_spec.spec_of(self)

    return get_kv_cache_spec
