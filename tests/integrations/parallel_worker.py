"""One of two processes that share the heads of a model: `python -m tests.integrations.parallel_worker RANK FOLDER`.

Writes what it saw to FOLDER/<model>.<rank>.pt. The test beside it starts both and compares.
"""

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from kvpolicy_kernels.formats import EntryFormat
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import kvpolicy
from kvpolicy import BudgetAllocator, BudgetError, BudgetPlan, ModelError, ModelSpec
from kvpolicy.integrations.transformers.cache.parallel import rank_and_size
from tests.integrations.ragged_oracle import ragged_table
from tests.tiny import over, tiny_ids

RANKS, PROMPT, NEW, CONTEXT = 2, 40, 12, 60
SMALL_BLOCK = EntryFormat(4, rotated=True, centred=True, exact_recent=2)


@dataclass(frozen=True, slots=True)
class AtRunTime(BudgetAllocator):
    needs_importance: ClassVar[bool] = False
    split_scope: ClassVar[str] = "model"

    def shares(self, importance, budget):
        return torch.ones(budget.shape)

    def split(self, scores, budget):
        return torch.ones(1, *budget.shape)


def plan_of(spec):
    """A ragged plan. Its two halves of the heads want different totals."""
    table = ragged_table(spec, 6, 24)
    table[:, spec.num_kv_heads // 2 :] += 12
    return BudgetPlan.from_capacities(spec, table, CONTEXT)


def seen_of(model, cache):
    """What generating `NEW` tokens shows."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(tiny_ids(PROMPT, batch=2), **over(cache), **options)
    held = {"capacities": cache.capacities, "lengths": cache.lengths}
    return held | {"tokens": out.sequences, "logits": torch.stack(out.logits, 1)}


def run(folder, name, rank):
    model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_size=RANKS))
    model.eval()
    spec = ModelSpec.from_config(model.config)
    plan, own = plan_of(spec), folder / f"{name}.{rank}.safetensors"
    found = {"rank_and_size": rank_and_size(model, spec)}
    cache = kvpolicy.new_cache(model, plan, context_length=CONTEXT)
    found["fixed"] = seen_of(model, cache)
    growing = kvpolicy.new_cache(model, plan, min_tokens=8)
    found["growing"] = seen_of(model, growing)
    growing.save(own)
    loaded = kvpolicy.load_cache(model, own, plan)
    with torch.no_grad():
        next_ids = found["growing"]["tokens"][:, -1:]
        found["went_on"] = [model(next_ids, **over(each)).logits for each in (growing, loaded)]
    with torch.no_grad():  # Qwen2's keys have a bias, of which each process has its heads' part
        coded = kvpolicy.new_cache(model, plan, context_length=CONTEXT, format=SMALL_BLOCK)
        found["coded"] = [model(ids, **over(coded)).logits for ids in (tiny_ids(PROMPT), tiny_ids(5))]
    dist.barrier()
    other = folder / f"{name}.{1 - rank}.safetensors"
    found["refused"] = [
        refusal(lambda: kvpolicy.load_cache(model, other, plan)),
        refusal(lambda: kvpolicy.new_cache(model, retention=0.5, allocator=AtRunTime())),
    ]
    torch.save(found, folder / f"{name}.{rank}.pt")


def refusal(call):
    try:
        call()
    except (BudgetError, ModelError) as error:
        return str(error)
    return ""


def main():
    rank, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    for name in names:
        run(folder, name, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
