"""The harness's model class over compressed caches. Import this module only where lm_eval is installed."""

from __future__ import annotations

from functools import partial
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvpolicy.budget.plan import BudgetPlan
from kvpolicy.integrations.lm_eval.continuations import ContinuationScorer, Likelihood
from kvpolicy.integrations.transformers import attached, new_cache


class PolicyLM(HFLM):  # type: ignore[misc]  # lm_eval is untyped
    """A model of lm-evaluation-harness whose contexts are compressed before anything behind them is scored or said.

    Generation, log-likelihoods and rolling log-likelihoods are those of `HFLM`, tokens and truncation included, but

    - a context is read once and compressed; its continuations, such as the choices of a question, each go on with a
      copy, and the tokens behind a context are kept on top of the capacities;
    - a rolling log-likelihood reads its text in chunks of 128 tokens, each over what was kept of those before.

    model, tokenizer: of transformers
    plan, options:    as in `new_cache`
    batch_size:       contexts of one generation; log-likelihoods are scored one context at a time

    Raises what `new_cache` raises.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: BudgetPlan | None = None,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self.budgets = (plan, {"decode": "append"} | options)
        self.scorer = ContinuationScorer(model, tokenizer, partial(new_cache, model, plan, **self.budgets[1]))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Likelihood]:
        """In the order of the requests. Requests of one context share its prefill."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, (_text, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # as `HFLM` cuts what is too long
            alike.setdefault(tuple(context[-room:]), []).append(index)
        answers: dict[int, Likelihood] = {}
        for kept, places in alike.items():
            scores = self.scorer.behind(kept, [requests[index][2] for index in places])
            for index, score in zip(places, scores, strict=True):
                answers[index] = score
                self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = sum(self.scorer.streaming(*make_disjoint_window(window)) for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def _model_generate(self, *args: Any, **options: Any) -> Any:
        plan, caches = self.budgets
        with attached(self.model, plan, **caches):
            return super()._model_generate(*args, **options)
