"""What a cache did, in numbers and in a few lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpolicy.budget.entry_format import MODEL, name_of
from kvpolicy.plugins import plugin_call

if TYPE_CHECKING:
    from kvpolicy.cache.store import RaggedStore


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The state of a cache. Entries are counted over all budgeted layers and KV heads held here.

    policy, params, decode: who evicts, with which parameters, and what decoding does at the capacity
    seen:      tokens of each sequence, padding excluded
    entries:   entries of each sequence held now, pending ones included
    full:      entries of each sequence if every token were kept
    protected: entries of each sequence in protected spans, on top of its budget
    asked:     entries of each sequence that the budget asks for in the whole model; empty where nothing is ever evicted
    allowed:   sum of each sequence's capacities in the whole model, without spans; above `asked` where floors exceed it
    nbytes, dense_nbytes: bytes held, tables included; bytes of the entries if every token were kept
    evicted:   whether an entry of any sequence was ever evicted
    first_token_seconds: from the first keys of the prompt until the first token behind it was handed in (on a GPU, as
        the device saw it); None before, and for a cache that was loaded
    peak_nbytes: the most memory until then above what was in use before the prompt, activations included: of the GPU,
        or of the process; None where the system does not say, or where more had been in use at some time before
    moves: how often entries were moved to other addresses, in the layer where it was most often: by each chunk of a
        prompt or turn, and where segments that grow have used up their room. A graph is recorded again behind each
    entry_format: the name of the entries' format, "model" for the model's dtype
    """

    policy: str
    params: dict[str, Any]
    decode: str
    seen: tuple[int, ...]
    entries: tuple[int, ...]
    full: tuple[int, ...]
    protected: tuple[int, ...]
    asked: tuple[int, ...]
    allowed: tuple[int, ...]
    nbytes: int
    dense_nbytes: int
    evicted: bool
    first_token_seconds: float | None
    peak_nbytes: int | None
    moves: int
    entry_format: str = MODEL

    @property
    def retention(self) -> float:
        """Fraction of the tokens seen that is really kept, protected spans included; 1 for an empty cache."""
        return sum(self.entries) / sum(self.full) if any(self.full) else 1.0

    @property
    def floors_exceed(self) -> bool:
        """Whether the least entries of the KV heads add up to more than the budget asks for."""
        return any(allowed > budget for budget, allowed in zip(self.asked, self.allowed, strict=True))

    def __str__(self) -> str:
        params = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        tokens = ", ".join(map(str, self.seen))
        lines = [
            f"policy: {self.policy}({params}), decode='{self.decode}'",
            f"tokens seen: {tokens}",
            f"kept: {sum(self.entries)} of {sum(self.full)} entries ({self.retention:.2%})",
            f"memory: {self.nbytes / 1e6:.2f} MB, a full cache {self.dense_nbytes / 1e6:.2f} MB",
        ]
        if self.first_token_seconds is not None:
            peak = "" if self.peak_nbytes is None else f", and {self.peak_nbytes / 1e6:.2f} MB at the most"
            lines.append(f"first token: {self.first_token_seconds:.3f} s{peak}")
        if self.entry_format != MODEL:
            lines.insert(1, f"format of the entries: {self.entry_format}")
        if not self.evicted:
            lines.append("nothing was evicted: every token seen is kept")
        if any(self.protected):
            lines.append(f"protected spans: {sum(self.protected)} entries, on top of the budget")
        if self.floors_exceed:
            lines.append(
                "the least entries of the KV heads (sink tokens, and one more or what stays exact) exceed the budget: "
                f"{sum(self.asked)} entries were asked for, {sum(self.allowed)} are allowed"
            )
        return "\n".join(lines)


def report_of(store: RaggedStore) -> CacheReport:
    """The report of a store as it is now."""
    opened = [layer for layer in store.layers if layer is not None]
    lengths, seen = store.lengths.sum((0, 2)), store.seen
    spanned = sum((layer.spanned * store.num_heads for layer in opened), start=0 * seen)
    rows = zip(store.rows.seen, store.rows.tables, strict=True) if store.schedule.evicts else ()
    budgets = [(store.schedule.total(count), int(table.sum())) for count, table in rows if table is not None]
    return CacheReport(
        policy=type(store.policy).__name__,
        params=plugin_call.params_of(store.policy),
        decode=store.decode_mode,
        seen=tuple(seen.tolist()),
        entries=tuple(lengths.tolist()),
        full=tuple((seen * len(store.layers) * store.num_heads).tolist()),
        protected=tuple(spanned.tolist()),
        asked=tuple(entries for entries, _ in budgets),
        allowed=tuple(allowed for _, allowed in budgets),
        nbytes=store.nbytes,
        dense_nbytes=store.dense_nbytes,
        evicted=any(bool(layer.evicted_at.any()) for layer in opened),
        first_token_seconds=store.first_token.seconds,
        peak_nbytes=store.first_token.peak_nbytes,
        moves=max((layer.arena.moves for layer in opened), default=0),
        entry_format=name_of(store.entry_format),
    )
