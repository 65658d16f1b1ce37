"""What it costs that a prompt attends under the budget too: vLLM with a plan beside the transformers cache.

    python plugins/vllm/benchmarks/prompts.py --out plugins/vllm/benchmarks/results/prompts.csv

SmolLM2-135M in float32 on the CPU, one capacity for all KV heads. The transformers cache lets a prompt attend to all of
itself, keeps what the policy says, and decodes under the budget; under vLLM every token attends under it.

- `perplexity`: of the second half of each sequence, behind its first half as the prompt (window rule; for the others of
  vLLM alone, because the transformers cache is not cut where vLLM's heads are).
- `pass keys`: prompts with a number in filler and a question for it, and the part of greedy answers that say it.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import kvpolicy
from kvpolicy.budget.plan import PlanChoice
from kvpolicy.text.corpus import make_corpus

COLUMNS = ("system", "policy", "kept", "measure", "value", "n", "context", "model", "text", "seed")
POLICIES = {
    "streaming": {"num_sink_tokens": 4},
    "keydiff": {"num_sink_tokens": 4, "recent_window": 32},
    "snapkv": {"num_sink_tokens": 4},
}
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="CSV, to which rows are added")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--passkeys", type=int, default=20)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--policies", nargs="+", choices=["full", *POLICIES], default=["full", *POLICIES])
    options = parser.parse_args()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TORCHDYNAMO_DISABLE="1",
    )
    bench = Bench(options)
    bench.transformers()
    with tempfile.TemporaryDirectory() as folder:
        bench.vllm(Path(folder))


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.tokenizer = kvpolicy.load_model("smollm2-135m")
        self.model = self.model.float()
        self.spec = kvpolicy.ModelSpec.from_config(self.model.config)
        corpus = make_corpus(None, lambda text: self.tokenizer(text)["input_ids"])
        ids = torch.as_tensor(corpus.heldout)
        self.text = corpus.name
        self.sequences = ids[: options.sequences * options.context].view(-1, options.context)
        self.task = kvpolicy.registry.create("task", "passkey", {})
        # room for the answer, so that a prompt and its answer are no longer than the context
        self.length = options.context - self.task.max_new_tokens
        self.samples = self.task.samples(self.tokenizer, options.passkeys, self.length, SEED)

    def plans(self) -> Iterator[tuple[str, float, kvpolicy.BudgetPlan]]:
        for kept in self.options.kept:
            entries = round(kept * self.options.context)
            table = torch.full(self.spec.table_shape, entries)
            for policy, params in POLICIES.items():
                if policy not in self.options.policies:
                    continue
                choice = PlanChoice(policy, params)
                yield (
                    policy,
                    entries / self.options.context,
                    kvpolicy.BudgetPlan.from_capacities(self.spec, table, self.options.context, policy=choice),
                )

    def transformers(self) -> None:
        half = self.options.context // 2
        for policy, kept, plan in self.plans():
            if policy == "streaming":
                table = plan.capacities(self.options.context, kept)
                probe = kvpolicy.TransformersProbe(
                    self.model, self.sequences, prefill_length=half, num_sink_tokens=4, batch_size=1
                )
                losses = torch.cat(list(probe.token_losses(table)))
                self.write("transformers", policy, kept, "perplexity", float(losses.mean().exp()), len(losses))
            answers = []
            for sample in self.samples:
                ids = torch.tensor([[*sample.context, *sample.questions[0]]])
                cache = kvpolicy.new_cache(self.model, plan, retention=kept, context_length=self.options.context)
                out = kvpolicy.generate(self.model, cache, ids, max_new_tokens=self.task.max_new_tokens)
                answers.append(out[0].tolist()[-self.task.max_new_tokens :])
            self.write("transformers", policy, kept, "pass keys", self.found(answers), len(answers))

    def vllm(self, folder: Path) -> None:
        self.model.save_pretrained(folder / "model")
        if "full" in self.options.policies:
            self.measure(folder, "full", 1.0, None)
        for policy, kept, plan in self.plans():
            path = folder / "plan.json"
            kvpolicy.save_plan(plan, path)
            settings = {"plan": str(path), "retention": kept, "context_length": self.options.context}
            self.measure(folder, policy, kept, settings)

    def measure(self, folder: Path, policy: str, kept: float, settings: dict[str, Any] | None) -> None:
        from vllm import LLM, SamplingParams
        from vllm.distributed import cleanup_dist_env_and_memory

        llm = LLM(
            model=str(folder / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=self.options.context + 1,
            max_num_seqs=4,
            enforce_eager=True,
            enable_prefix_caching=False,
            **({} if settings is None else {"additional_config": {"kvpolicy": settings}}),
        )
        prompts = [{"prompt_token_ids": ids} for ids in self.sequences.tolist()]
        scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        losses = []
        for output, ids in zip(llm.generate(prompts, scoring, use_tqdm=False), self.sequences.tolist(), strict=True):
            steps = list(zip(output.prompt_logprobs, ids, strict=True))[self.options.context // 2 :]
            losses.append([-step[token].logprob for step, token in steps])
        perplexity = float(torch.tensor(losses).mean().exp())
        self.write("vllm", policy, kept, "perplexity", perplexity, len(losses))
        asked = [{"prompt_token_ids": [*sample.context, *sample.questions[0]]} for sample in self.samples]
        greedy = SamplingParams(temperature=0, max_tokens=self.task.max_new_tokens, ignore_eos=True, detokenize=False)
        answers = [list(out.outputs[0].token_ids) for out in llm.generate(asked, greedy, use_tqdm=False)]
        self.write("vllm", policy, kept, "pass keys", self.found(answers), len(answers))
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def found(self, answers: list[list[int]]) -> float:
        texts = self.tokenizer.batch_decode(answers)
        scores = [self.task.score(text, sample.turns[0]) for text, sample in zip(texts, self.samples, strict=True)]
        return sum(scores) / len(scores)

    def write(self, system: str, policy: str, kept: float, measure: str, value: float, n: int) -> None:
        context = self.options.context if measure == "perplexity" else self.length
        row = (system, policy, round(kept, 4), measure, round(value, 4), n, context, "smollm2-135m", self.text, SEED)
        path = Path(self.options.out)
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            writer.writerow(row)
        print(*row, flush=True)


if __name__ == "__main__":
    main()
