"""`kvpolicy generate`: text from a model over a compressed cache, with bytes and speed."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpolicy.cli import cache_options
from kvpolicy.cli import options as opt
from kvpolicy.cli.terminal import write
from kvpolicy.cli.watch import turning, watcher
from kvpolicy.defaults import MIN_TOKENS
from kvpolicy.errors import BudgetError, KVPolicyError, ModelError, PlanWarning, TextError, foreign
from kvpolicy.files.regular import read_bytes
from kvpolicy.plugins.params import parse_params

if TYPE_CHECKING:
    import torch

    from kvpolicy.verbs.cache_choice import CacheChoice

_MOST_BYTES = 64 * 2**20  # of a prompt


def generate(
    plan: cache_options.PlanName = "uniform",
    prompt: Annotated[str | None, typer.Option(help="The prompt.", show_default=False)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file with the prompt; - is standard input.", show_default=False)
    ] = None,
    retention: Annotated[
        float | None,
        typer.Option(
            "--retention",
            "-r",
            help="Kept fraction of the tokens seen. Default: the plan's highest level; needed for uniform.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Mean entries per KV head, instead of --retention; needs a plan.",
            show_default=False,
        ),
    ] = None,
    memory: cache_options.Memory = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Continue the prompt as it stands, without a chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    policy: cache_options.Policy = None,
    policy_param: opt.PolicyParams = None,
    allocator: cache_options.Allocator = None,
    format: cache_options.Format = None,
    min_tokens: cache_options.MinTokens = MIN_TOKENS,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    model: cache_options.ModelOfPlan = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    revision: opt.Revision = None,
    config: opt.Config = None,
    json: opt.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="The text alone: no progress, no figures.")] = False,
) -> None:
    """Generate text over a cache that keeps what a plan allows, and say what was kept and how fast it was.

    The text goes to standard output as it comes, the figures to standard error. Where the tokenizer has a chat
    template, the prompt is put into it as a user's message; --no-chat leaves it as it is. Short prompts are kept
    whole: nothing is evicted before a sequence has more than --min-tokens tokens.
    """
    import torch

    from kvpolicy.budget.entry_format import name_of
    from kvpolicy.budget.memory_size import read_memory
    from kvpolicy.verbs import arguments
    from kvpolicy.verbs.cache_choice import CacheChoice, load_network

    text = _prompt(prompt, prompt_file)
    params = parse_params(policy_param, "--policy-param")
    choice = CacheChoice.of(plan, policy, params, allocator, min_tokens, format)
    sizes: dict[str, Any] = {"tokens": tokens}
    if memory is None:
        retention = _retention(choice, retention, tokens)
    elif retention is not None or tokens is not None or choice.name == "full":
        raise BudgetError("--memory goes with a plan or uniform, without --retention and --tokens: give one of them")
    else:
        read_memory(memory)  # refused now, not behind the model
    where = arguments.pick_device(device)

    progress = watcher(quiet or json)
    name, network, tokenizer = load_network(
        model, choice.plan, progress, revision=revision, device=where, dtype=arguments.pick_dtype(dtype, where)
    )
    ids, is_chat = _encode(tokenizer, text, no_chat)
    if memory is not None:
        sizes = {"memory": memory, "context_length": ids.shape[1] + max_new_tokens}
    cache = choice.make(network, retention, **sizes)
    _warn_of_lost_facts(choice, retention if tokens is None else min(tokens / ids.shape[1], 1.0))
    progress.note(f"{name} from {network.kvpolicy_source}, on {where}: {ids.shape[1]} tokens of prompt")
    whole, known = ids.shape[1] + max_new_tokens, cache.spec.max_context
    if whole > known > 0:
        progress.note(f"{whole} tokens with the answer are more than the {known} that the model was made for")
    torch.manual_seed(seed)
    with contextlib.ExitStack() as reading:
        if not quiet:
            reading.enter_context(turning(f"reading {ids.shape[1]} tokens"))
        stream = _Stream(tokenizer, silent=json, reading=reading)
        _run(network, cache, ids, stream, max_new_tokens, temperature)
    figures = _figures(cache, stream, ids.shape[1])
    if json:
        settings = {"plan": plan, "model": name, "retention": retention, "tokens": tokens, "memory": memory}
        settings |= {"policy": choice.policy_name, "format": name_of(cache.recipe.entry_format)}
        run = {"chat": is_chat, "device": where, "dtype": str(network.dtype).removeprefix("torch.")}
        opt.print_json({**settings, **run, "text": stream.text, **asdict(figures)})
    elif not quiet:
        _report(plan, figures, min_tokens)


def _retention(choice: CacheChoice, retention: float | None, tokens: int | None) -> float | None:
    """The retention to ask for; None for `full` and with `tokens`."""
    choice.check(retention, ", or give --tokens to scale the lowest level")
    if tokens is not None:
        if choice.plan is None:
            raise BudgetError(f"--tokens needs a plan file; {choice.name} takes --retention")
        if retention is not None:
            raise BudgetError("--retention and --tokens were given: give one")
        return None
    if retention is not None or choice.name == "full":
        return retention
    if choice.plan is None:
        raise BudgetError("generate uniform needs --retention; or give a plan file, or full")
    return choice.plan.retentions[-1]


def _warn_of_lost_facts(choice: CacheChoice, kept: float | None) -> None:
    """Of the level that is used, or the nearest one below; below the lowest that one's shares are used.

    kept: fraction of the tokens, 1 or None for all of them
    """
    plan = choice.plan
    if plan is None or kept is None or kept >= 1:
        return
    from kvpolicy.report.numbers import lost_facts, sorted_levels

    warning = lost_facts(plan, plan.level_at(kept) or sorted_levels(plan)[0])
    if warning:
        warnings.warn(warning, PlanWarning, stacklevel=2)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise KVPolicyError("give a prompt: either --prompt or --prompt-file")
    if file is None:
        text = prompt or ""
    else:
        try:
            content = sys.stdin.buffer.read(_MOST_BYTES + 1) if str(file) == "-" else read_bytes(file, _MOST_BYTES)
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TextError(f"the prompt in {file} is not UTF-8: {error.reason} at byte {error.start}") from error
        except KVPolicyError as error:
            raise TextError(f"cannot read the prompt {file}: {error}") from None
    if len(text) > _MOST_BYTES:
        raise TextError(f"the prompt is larger than {_MOST_BYTES // 2**20} MiB")
    if not text.strip():
        raise TextError("the prompt is empty")
    return text


def _encode(tokenizer: Any, text: str, no_chat: bool) -> tuple[torch.Tensor, bool]:
    """(int64 [1, n], whether it stands in the tokenizer's chat template)."""
    from kvpolicy.integrations.transformers.model.token_ids import chat_turn

    is_chat = not no_chat and bool(tokenizer.chat_template)
    prompt = chat_turn(tokenizer, text) if is_chat else text
    with foreign(f"the tokenizer of {tokenizer.name_or_path} cannot read the prompt", ModelError):
        ids = tokenizer(prompt, add_special_tokens=not is_chat, return_tensors="pt", verbose=False).input_ids
    if not ids.numel():
        raise TextError(f"the prompt is empty: the tokenizer of {tokenizer.name_or_path} makes no token of it")
    return ids, is_chat


class _Stream:
    """A streamer for `generate`: prints text as soon as it is whole, and notes when each token came.

    transformers calls `put` with the prompt, then with each token, and `end`.

    reading: closed by the first token
    """

    def __init__(self, tokenizer: Any, *, silent: bool, reading: contextlib.ExitStack) -> None:
        self.tokenizer, self._silent, self._reading = tokenizer, silent, reading
        self.ids: list[int] = []
        self.begun: float | None = None
        self.times: list[float] = []  # one for each token
        self._first = self._shown = 0  # tokens: where the decoded stretch begins, and how far it is printed

    @property
    def text(self) -> str:
        return self._decode(0, len(self.ids))

    def put(self, ids: torch.Tensor) -> None:
        if self.begun is None:
            self.begun = time.perf_counter()
            return
        self.times.append(time.perf_counter())
        self._reading.close()
        self.ids += ids.flatten().tolist()
        self._print(whole=True)

    def end(self) -> None:
        self._print(whole=False)
        if not self._silent:
            write("\n")

    def _print(self, *, whole: bool) -> None:
        """Prints what is new. whole: not while a character lacks some of its bytes."""
        if self._silent:
            return
        before, now = self._decode(self._first, self._shown), self._decode(self._first, len(self.ids))
        if whole and now.endswith("\ufffd"):
            return
        write(now[len(before) :])
        self._first, self._shown = self._shown, len(self.ids)

    def _decode(self, begin: int, end: int) -> str:
        decoded: str = self.tokenizer.decode(
            self.ids[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded


def _run(network: Any, cache: Any, ids: torch.Tensor, stream: _Stream, count: int, temperature: float) -> None:
    """Generates into `stream`."""
    from kvpolicy.integrations.transformers import generate as generate_with
    from kvpolicy.integrations.transformers.model.quiet import quiet

    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    ends = network.generation_config.eos_token_id
    filler = ends[0] if isinstance(ends, list) else ends  # one row needs none; transformers asks for it
    try:
        with quiet():
            generate_with(
                network,
                cache,
                ids.to(network.device),
                max_new_tokens=count,
                num_beams=1,
                num_return_sequences=1,
                pad_token_id=network.generation_config.pad_token_id or filler,
                tokenizer=stream.tokenizer,
                streamer=stream,
                **sampling,
            )
    except KeyboardInterrupt:
        stream.end()  # the text so far is a line of its own
        raise


@dataclass(frozen=True, slots=True)
class _Figures:
    """What a run has held and how long it took.

    entries, entries_seen: of the budgeted layers at the end; the last token generated was never fed
    bytes:       that the whole cache holds, tables and layers without a budget included
    dense_bytes: that it would hold had nothing been evicted, without tables
    evicted:     whether anything was evicted at all
    """

    prompt_tokens: int
    new_tokens: int
    entries: int
    entries_seen: int
    kept: float
    evicted: bool
    bytes: int
    dense_bytes: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None


def _figures(cache: Any, stream: _Stream, prompt_tokens: int) -> _Figures:
    store, report = cache.store, cache.report()
    begun = stream.begun or 0.0
    prefill, decode = stream.times[0] - begun, stream.times[-1] - stream.times[0]
    steps = len(stream.times) - 1
    return _Figures(
        prompt_tokens=prompt_tokens,
        new_tokens=len(stream.ids),
        entries=sum(report.entries),
        entries_seen=sum(report.full),
        kept=report.retention,
        evicted=report.evicted,
        bytes=cache.nbytes,
        dense_bytes=store.dense_nbytes + cache.nbytes - store.nbytes,
        prefill_seconds=prefill,
        decode_seconds=decode,
        prefill_tokens_per_second=prompt_tokens / prefill,
        decode_tokens_per_second=steps / decode if steps else None,
    )


def _report(plan: str, figures: _Figures, min_tokens: int) -> None:
    from rich.table import Table

    from kvpolicy.cli.terminal import Console
    from kvpolicy.report.numbers import size

    table = Table.grid(padding=(0, 2))
    decode, steps = figures.decode_tokens_per_second, figures.new_tokens - 1
    table.add_row("kept", f"{figures.entries} of {figures.entries_seen} entries ({figures.kept:.1%})")
    table.add_row("cache", f"{size(figures.bytes)}; {size(figures.dense_bytes)} with nothing evicted")
    speed = f"{figures.prompt_tokens} tokens in {figures.prefill_seconds:.2f} s"
    table.add_row("prompt", f"{speed}, {figures.prefill_tokens_per_second:.1f} tokens/s")
    if decode is not None:
        speed = f"{steps} more tokens in {figures.decode_seconds:.2f} s"
        table.add_row("answer", f"{speed}, {decode:.1f} tokens/s")
    console = Console(stderr=True)
    console.print(table)
    if not figures.evicted:
        reason = f": {min_tokens} entries of each KV head are kept in any case (--min-tokens)"
        console.print(f"nothing was evicted{'' if plan == 'full' else reason}", soft_wrap=True)
