"""What a plan keeps of a piece of held-out text, seen in a real cache."""

from __future__ import annotations

from typing import Any

import torch

from kvpolicy.budget.ask import Ask
from kvpolicy.budget.plan import BudgetPlan, policy_of
from kvpolicy.measure.evaluation import probe_for
from kvpolicy.report.kept_tokens import KeptTokens
from kvpolicy.text.corpus import Corpus

_MOST_TOKENS = 512


def kept_sample(model: Any, tokenizer: Any, corpus: Corpus, plan: BudgetPlan) -> KeptTokens:
    """Fills a cache with the first held-out tokens, at most as many as the plan was made on, at its lowest level."""
    length = min(_MOST_TOKENS, int(plan.provenance.get("context_length", _MOST_TOKENS)))
    sequence, retention = corpus.sequences("heldout", 1, length), plan.retentions[0]
    entry_format = plan.entry_format(Ask(retention))
    probe = probe_for(
        policy_of(plan), model, sequence, tokenize=corpus.tokenize, tokenizer=tokenizer, entry_format=entry_format
    )
    tokens = probe.context_length
    store = probe.filled(plan.capacities(tokens, retention).clamp(max=tokens))
    kept = torch.zeros(*plan.model.table_shape, tokens, dtype=torch.bool)
    for layer, of_layer in enumerate(kept):
        for of_head, positions in zip(of_layer, store.positions(layer), strict=True):
            of_head[positions.cpu()] = True
    words = [tokenizer.decode([token]) for token in sequence[0, :tokens].tolist()]
    return KeptTokens(words, kept, plan.model.budgeted_layers, retention)
