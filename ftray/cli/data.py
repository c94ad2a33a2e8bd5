"""`ftray data`: prepare a run's rows and show what the model will see."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftray.cli.console import open_console
from ftray.cli.words import count, duration, facts, json_text, percent, some
from ftray.config import Run
from ftray.errors import EXIT_OK
from ftray.manifest import join
from ftray.session import ray_session

if TYPE_CHECKING:
    from ftray.data.prepared import PreparedData

_BAR = 40
_SHOWN_TOKENS = 400
_SHOWN_REJECTED = 5
Part = tuple[str, bool]
"""(text, whether its tokens are targets)"""


def data_command(run: Run, *, samples: int, as_json: bool, verbose: bool) -> int:
    with open_console(out=sys.stderr if as_json else sys.stdout) as console:
        console({"kind": "status", "text": "starting Ray"})
        with ray_session(verbose=verbose):
            from ftray.data.prepare import prepare

            uri = prepare(run, console)
    from ftray.data.prepared import PreparedData

    prepared = PreparedData.open(uri)
    shown = sample_rows(run, prepared, samples)
    if as_json:
        listed = [{"from": where, "parts": parts} for where, parts in shown]
        print(json_text({**prepared.facts, "uri": uri, "samples": listed}, indent=2, ensure_ascii=False))
        return EXIT_OK
    print(f"\n{describe(run, prepared.facts, uri)}")
    for where, parts in shown:
        print(f"\n{where}")
        show_sample(parts)
    return EXIT_OK


# --------------------------------------------------------------------------------------------------------------- counts


def describe(run: Run, found: dict[str, Any], uri: str) -> str:
    """Counts, lengths, and what was put aside."""
    rows = found["rows"]
    pairs = [("prepared", f"{uri}\nin {duration(found['seconds'])}; digest {found['digest'][:16]}")]
    pairs.append(("rows", _rows_text(rows)))
    for split in ("train", "held_out"):
        if tokens := found["tokens"].get(split):
            targets = found["target_tokens"][split]
            text = f"{count(tokens)}, of which {count(targets)} ({percent(targets / tokens)}) are targets"
            pairs.append((f"tokens, {split.replace('_', '-')}", text))
    if len(found["sources"]) > 1:
        listed = (f"{s['path']}: {some(s['rows'], 'row')}, {count(s['rejected'])} put aside" for s in found["sources"])
        pairs.append(("sources", "\n".join(listed)))
    pairs.append(("lengths", histogram(found["length_histogram"], found["max_length"])))
    if rows["rejected"]:
        pairs.append(("put aside", _rejected_text(run, found)))
    return facts(pairs, indent=0)


def _rows_text(rows: dict[str, int]) -> str:
    text = f"{count(rows['train'])} to train on, {count(rows['held_out'])} held out; {count(rows['read'])} read"
    if rows.get("truncated"):
        text += f"; {count(rows['truncated'])} truncated"
    return text


def _rejected_text(run: Run, found: dict[str, Any]) -> str:
    rows = found["rows"]
    lines = [f"{some(rows['rejected'], 'row')} ({percent(rows['rejected'] / max(1, rows['read']))} of those read)"]
    lines += [f"{count(n)} × {reason}" for reason, n in found["rejected_by_reason"].items()]
    for entry in found.get("rejected_first", [])[:_SHOWN_REJECTED]:
        lines.append(f"  {entry['file']}:{entry['row']}: {entry['reason']}: {entry['sample']}")
    return "\n".join([*lines, f"all of them: {join(run.folder, 'rejected.jsonl')}"])


def histogram(found: dict[str, Sequence[float]], most: int) -> str:
    """Bars of rows by tokens; empty bins below the shortest and above the longest row are left out."""
    edges, counts = found["edges"], [int(n) for n in found["counts"]]
    used = [i for i, n in enumerate(counts) if n]
    if not used:
        return "no rows"
    together = -(-(used[-1] + 1 - used[0]) // 16)  # bins a line, so that no more than 16 lines are needed
    starts = range(used[0], used[-1] + 1, together)
    highest = max(sum(counts[i : i + together]) for i in starts)
    lines = []
    for i in starts:
        number = sum(counts[i : i + together])
        low, high = edges[i], edges[min(i + together, len(edges) - 1)]
        bar = "█" * round(_BAR * number / highest) or ("▏" if number else "")
        lines.append(f"{low:>7,.0f}–{high:<7,.0f} {bar:<{_BAR}} {count(number)}")
    return f"tokens a row, at most {count(most)}\n" + "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- samples


def sample_rows(run: Run, prepared: PreparedData, number: int) -> list[tuple[str, list[Part]]]:
    """(where it is from, its text in parts) of some rows, spread evenly over the training rows; of a preference both
    of its sides, one after the other."""
    rows = prepared.train
    number = min(number, len(rows))
    if not number:
        return []
    from ftray.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model, run.data.chat_template)
    shown = []
    for i in range(number):
        at = i * len(rows) // number
        row, where = rows[at], rows.provenance(at)
        if run.objective.name == "dpo":
            border = int(row.sequence_lengths[0])
            pieces = [(f"{where} · chosen", slice(border)), (f"{where} · rejected", slice(border, None))]
        else:
            pieces = [(where, slice(None))]
        for name, piece in pieces:
            tokens, targets = row.tokens[piece], row.targets[piece]
            parts = marked(tokenizer, tokens[:_SHOWN_TOKENS].tolist(), targets[:_SHOWN_TOKENS].tolist())
            if len(tokens) > _SHOWN_TOKENS:
                parts.append((f"… ({some(len(tokens) - _SHOWN_TOKENS, 'more token')})", False))
            shown.append((f"{name} · {some(len(tokens), 'token')}", parts))
    return shown


def marked(tokenizer: Any, tokens: Sequence[int], targets: Sequence[bool]) -> list[Part]:
    """The tokens as text, cut where targets begin and end. A part is what the text grows by, since a token's text may
    depend on those before it."""
    parts: list[Part] = []
    before, start = "", 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and targets[end] == targets[start]:
            continue
        text = tokenizer.decode(tokens[:end], skip_special_tokens=False)
        grown = text[len(before) :] if text.startswith(before) else tokenizer.decode(tokens[start:end])
        parts.append((grown, bool(targets[start])))
        before, start = text, end
    return parts


def show_sample(parts: Sequence[Part]) -> None:
    """Print it; targets are green and underlined on a terminal, and stand in ⟦ ⟧ elsewhere."""
    if not sys.stdout.isatty():
        print("".join(f"⟦{text}⟧" if target else text for text, target in parts))
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text.assemble(*[(text, "green underline" if target else "dim") for text, target in parts])
    Console(highlight=False, soft_wrap=True).print(styled)
