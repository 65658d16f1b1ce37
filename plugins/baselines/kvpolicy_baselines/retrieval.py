"""Retrieval: how much a KV head looks at the answer of a question, in prompts that are made for it.

Source: the head scores of HeadKV, arXiv:2410.19258; FYYFU/HeadKV, retrieval_head_detection_r2.py, and through it the
retrieval heads of arXiv:2404.15574. Different on purpose:

- The right answer stands in the prompt. The source lets the model write one and leaves out what came out wrong.
- All attention on the needle's answer counts. The source counts what is among the largest entries of a step.
- The needles are made here, and the haystack is the calibration text.
- The scores are those of KV heads. The source's are those of query heads.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import Importance, ImportanceEstimator, LayerActivations, ModelProbe, ModelSpec, PluginError

_NAMES = ("Amsterdam", "Boston", "Cairo", "Dublin", "Helsinki", "Lisbon", "Madrid", "Oslo", "Prague", "Vienna")


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    ids: Tensor  # [n], the answer's last token left out: nothing follows it
    answer: slice  # in the needle
    queries: int  # at the end: those that predict a token of the answer


@dataclass(frozen=True, slots=True)
class RetrievalEstimator(ImportanceEstimator):
    """Importance of a KV head = the part of its attention that lies on the needle's answer, while it is given.

    In every calibration prompt a sentence with a number is put somewhere (the needle), and at the end a question asks
    for the number, with the answer. Attention counts where a token of the answer is predicted; it is averaged over
    these tokens, the query group and the prompts.

    depths: places of the needle in each calibration prompt, evenly from its begin to its end
    seed:   of names and numbers
    """

    requires: ClassVar[frozenset[str]] = frozenset({"window_attention"})

    depths: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.depths < 1:
            raise PluginError(f"retrieval: depths must be at least 1, got {self.depths}")

    def estimate(self, probe: ModelProbe) -> Importance:
        per_head, group = torch.zeros(probe.spec.table_shape), probe.spec.group_size
        prompts = list(self._prompts(probe))
        if not prompts:
            longest = max((len(prompt) for prompt in probe.prompts), default=0)
            raise PluginError(
                f"retrieval: no calibration prompt has room for a needle and a question; the longest has {longest} "
                "tokens, give a larger context"
            )
        for prompt in prompts:

            def visit(activations: LayerActivations, prompt: _Prompt = prompt) -> None:
                on_answer = activations.window_attention[..., prompt.answer].sum(-1).mean(0)
                per_head[activations.layer] += on_answer.cpu() / (prompt.queries * group)

            probe.observe(visit, self.requires, prompts=[prompt.ids], observation_window=prompt.queries)
        return Importance(per_head=per_head / len(prompts))

    def num_forwards(self, spec: ModelSpec, *, prompts: int, sequences: int) -> int:
        return self.depths * prompts

    def _prompts(self, probe: ModelProbe) -> Iterator[_Prompt]:
        """Each as long as its calibration prompt; where less than a quarter of that would be left, there is none."""
        draw = random.Random(self.seed)
        for haystack in probe.prompts:
            for place in range(self.depths):
                name, number = draw.choice(_NAMES), str(draw.randrange(10**6, 10**7))
                before, after = probe.tokenize(f"\nThe code of {name} is"), probe.tokenize(".\n")
                answer = probe.tokenize(f" {number}")
                question = probe.tokenize(f"\nWhat is the code of {name}? It is")
                room = len(haystack) - sum(map(len, (before, answer, after, question, answer[:-1])))
                if room < len(haystack) / 4:
                    continue
                # never in front of the first token, which may be the one that begins every text
                cut = 1 + round((room - 1) * (place + 0.5) / self.depths)
                parts = [haystack[:cut], before, answer, after, haystack[cut:room], question, answer[:-1]]
                start = cut + len(before)
                yield _Prompt(torch.cat(parts), slice(start, start + len(answer)), len(answer))
