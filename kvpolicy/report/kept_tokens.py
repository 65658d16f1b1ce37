"""What a cache keeps of one prompt, as HTML: tokens over KV heads, and the text of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvpolicy.report.numbers import percent
from kvpolicy.report.page import text

_ROW, _GREEN = 4, (0, 90, 50)
_MOST_TOKENS = 1024  # of the text that is shown


@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """tokens: the text of each; kept: bool `[L, H, n]`; layers: their model layer indices; retention: of the prompt"""

    tokens: Sequence[str]
    kept: Tensor
    layers: Sequence[int]
    retention: float


def kept_tokens_html(sample: KeptTokens) -> str:
    """A map with a row for each KV head, and the prompt, the darker a token the more KV heads keep it."""
    layers, heads, count = sample.kept.shape
    said = (
        f"{count} tokens of held-out text, {percent(sample.retention)} kept. Each row of the map is a KV head, "
        "layer by layer; green is kept. In the text a token is the darker, the more KV heads keep it."
    )
    height = layers * heads * _ROW
    places = enumerate((layer, head) for layer in range(layers) for head in range(heads))
    rows = "".join(_row(sample, layer, head, number * _ROW) for number, (layer, head) in places)
    label = f"{count} tokens over {layers} layers of {heads} KV heads"
    return (
        f'<p class="note">{text(said)}</p>\n<figure class="wide"><svg viewBox="0 0 {count} {height}" '
        f'preserveAspectRatio="none" style="height:{min(height, 420)}px;background:#f1f1f1" role="img" '
        f'aria-label="{text(label)}">{rows}</svg></figure>\n<p class="tokens">{"".join(_words(sample))}</p>'
    )


def _row(sample: KeptTokens, layer: int, head: int, y: int) -> str:
    """Runs of tokens that one KV head keeps."""
    kept = sample.kept[layer, head].tolist()
    way = "".join(f"M{begin} {y}h{end - begin}v{_ROW - 1}h{begin - end}z" for begin, end in _runs(kept))
    title = text(f"layer {sample.layers[layer]}, KV head {head}: {sum(kept)} of {len(kept)} kept")
    return f'<path fill="rgb{_GREEN}" d="{way}"><title>{title}</title></path>\n'


def _runs(kept: Sequence[bool]) -> Iterator[tuple[int, int]]:
    begin = None
    for index, is_kept in enumerate([*kept, False]):
        if is_kept and begin is None:
            begin = index
        elif not is_kept and begin is not None:
            yield begin, index
            begin = None


def _words(sample: KeptTokens) -> Iterator[str]:
    heads = sample.kept.shape[0] * sample.kept.shape[1]
    counts = sample.kept.flatten(0, 1).sum(0).tolist()
    for token, count in zip(sample.tokens[:_MOST_TOKENS], counts, strict=False):
        part = count / heads
        style = f"background:rgba{(*_GREEN, round(part, 3))}" + (";color:#fff" if part > 0.55 else "")
        yield f'<span style="{style}" title="{count} of {heads} KV heads keep it">{text(token)}</span>'
