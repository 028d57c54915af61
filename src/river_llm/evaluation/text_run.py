"""Perplexity of a text, and the KL divergence from the backbone, window by window.

Laid out as `llama-perplexity` does it: windows of equal length that don't overlap; the first half
of each is context, every token after it is predicted and counts. So the figures can stand beside
those of `llama-perplexity --kl-divergence` at the same ``-c``. Every token leaves by its own
similarity, as decoding would take it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from river_llm.errors import ConfigError, DataError
from river_llm.evaluation.run import count_layers, describe_model, summarise_work
from river_llm.evaluation.statistics import mean_and_error
from river_llm.exit_policy import ExitPolicy
from river_llm.measure.likelihood import check_likelihoods
from river_llm.river_lm import RiverLM
from river_llm.text.utf8 import read_text

_COLUMNS = 128  # tokens of one pass
_KLD_QUANTILES = (1, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0)
_CHANGE_QUANTILES = (1, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0)


class TextRun:
    """See `Run`; an item is a window. ``kld`` runs the backbone beside the policy, and holds the
    logits of half a window meanwhile: its length times twice the vocabulary, in bytes."""

    def __init__(
        self,
        lm: RiverLM,
        text: Path,
        *,
        model_name: str,
        with_backbone: bool,
        window: int = 512,
        limit: int | None = None,
    ) -> None:
        """Read the text.

        Args:
            with_backbone: measure the divergence from the backbone, not the perplexity alone.
            window: tokens of a window.
            limit: windows, the first ones.

        Raises:
            ConfigError: a window is too short, or longer than the model's context.
            DataError: the text can't be read, or has no whole window.
        """
        self.name = "kld" if with_backbone else "perplexity"
        self._lm, self._with_backbone = lm, with_backbone
        room = lm.engine.context_length
        if window < 4 or (room is not None and window > room):
            most = "" if room is None else f" to {room}, the model's context"
            raise ConfigError(f"--window is {window}; give 4{most or ' or more'}")
        words = read_text(text)
        token_ids = list(lm.tokenizer(words, add_special_tokens=False).input_ids)
        count = len(token_ids) // window
        if count == 0:
            raise DataError(f"{text} has {len(token_ids)} tokens, less than one window of {window}")
        self._windows = [token_ids[i * window : (i + 1) * window] for i in range(count)]
        begin = lm.tokenizer.bos_token_id
        if begin is not None and list(lm.tokenizer("a").input_ids)[:1] == [begin]:
            for one in self._windows:
                one[0] = begin
        self.ids = list(range(count if limit is None else min(limit, count)))
        self._first = window // 2
        self.notes: list[str] = []
        self.identity = {
            **describe_model(lm, model_name),
            "task": self.name,
            "data": f"sha256:{hashlib.sha256(words.encode()).hexdigest()}",
            "window": window,
        }
        del self.identity["policy"]["prefill"]  # not used

    def answer(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return [self._measure(self._windows[item]) for item in ids]

    def summarise(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        nll = _joined(records, "nll")
        perplexity, error = _exponential(*mean_and_error(nll))
        summary: dict[str, Any] = {
            "items": len(records),
            "predicted_tokens": len(nll),
            "perplexity": perplexity,
            "perplexity_error": error,
        }
        if self._with_backbone:
            summary |= summarise_divergence(
                nll,
                _joined(records, "nll_backbone"),
                _joined(records, "kld"),
                _joined(records, "change"),
                [float(value) for value in _joined(records, "same")],
            )
        return {**summary, **summarise_work(records, self._lm.engine.num_layers)}

    def _measure(self, window: list[int]) -> dict[str, Any]:
        self._lm.forget_cache()
        targets = torch.tensor(window[self._first + 1 :])
        record: dict[str, Any] = {}
        if self._with_backbone:
            reference = [logits for logits, _ in self._passes(window, ExitPolicy.never())]
        found: dict[str, list[Tensor]] = {}
        layers: list[int] = []
        done = 0
        for logits, exit_layers in self._passes(window, self._lm.policy):
            expected = targets[done : done + len(logits)]
            base = reference.pop(0) if self._with_backbone else None
            for name, values in _compare(logits, base, expected).items():
                check_likelihoods(values, logits, *([] if base is None else [base]))
                found.setdefault(name, []).append(values)
            layers += exit_layers
            done += len(logits)
        for name, parts in found.items():
            record[name] = [float(f"{value:.7g}") for value in torch.cat(parts).tolist()]
        return {
            **record,
            "exit_layers": count_layers(layers),
            "tokens": len(window) * (2 if self._with_backbone else 1),
        }

    def _passes(self, window: list[int], policy: ExitPolicy) -> Iterator[tuple[Tensor, list[int]]]:
        """Logits `[tokens, vocabulary]` that count, and the exit layers of their tokens."""
        engine = self._lm.engine
        before = engine.policy
        engine.policy = replace(policy, prefill="token")
        try:
            engine.truncate(0)
            if self._first > 0:
                engine.prefill(torch.tensor([window[: self._first]]))
            for start in range(self._first, len(window) - 1, _COLUMNS):
                part = window[start : min(start + _COLUMNS, len(window) - 1)]
                step = engine.score(torch.tensor([part]))
                yield step.logits[0], step.exit_layers[0].tolist()
        finally:
            engine.policy = before


def _compare(logits: Tensor, base: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """Of each predicted token: its negative log-likelihood, and beside the backbone's logits `base`
    that of the backbone, the KL divergence from it, the change of the token's probability, and
    whether both find the same token likeliest."""
    rows = targets.to(logits.device).unsqueeze(1)
    log_q = logits.float().log_softmax(-1)
    nll = -log_q.gather(1, rows).squeeze(1)
    if base is None:
        return {"nll": nll.cpu()}
    log_p = base.float().log_softmax(-1)
    nll_base = -log_p.gather(1, rows).squeeze(1)
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "nll": nll.cpu(),
        "nll_backbone": nll_base.cpu(),
        "kld": kld.cpu(),
        "change": ((-nll).exp() - (-nll_base).exp()).cpu(),
        "same": (logits.argmax(-1) == base.argmax(-1)).int().cpu(),
    }


def summarise_divergence(
    nll: Sequence[float],
    nll_backbone: Sequence[float],
    kld: Sequence[float],
    change: Sequence[float],
    same: Sequence[float],
) -> dict[str, Any]:
    """The figures of llama.cpp's KL divergence block, per predicted token; KLD in nats, changes of
    a probability as shares."""
    backbone, backbone_error = _exponential(*mean_and_error(nll_backbone))
    ratios = [a - b for a, b in zip(nll, nll_backbone, strict=True)]
    log_ratio, log_ratio_error = mean_and_error(ratios)
    ratio, ratio_error = _exponential(log_ratio, log_ratio_error)
    squares = [value**2 for value in change]
    mean_square, square_error = mean_and_error(squares)
    rms = math.sqrt(mean_square)
    mean_kld, kld_error = mean_and_error(kld)
    mean_change, change_error = mean_and_error(change)
    same_top, same_error = mean_and_error(same)
    perplexity = math.exp(math.fsum(nll) / len(nll))
    # of a difference of two exponentials, to first order
    differences = [perplexity * a - backbone * b for a, b in zip(nll, nll_backbone, strict=True)]
    return {
        "backbone_perplexity": backbone,
        "backbone_perplexity_error": backbone_error,
        "correlation": _correlation(nll, nll_backbone),
        "log_ratio": log_ratio,
        "log_ratio_error": log_ratio_error,
        "ratio": ratio,
        "ratio_error": ratio_error,
        "difference": perplexity - backbone,
        "difference_error": mean_and_error(differences)[1],
        "mean_kld": mean_kld,
        "mean_kld_error": kld_error,
        "kld_quantiles": _quantiles(kld, _KLD_QUANTILES),
        "mean_change": mean_change,
        "mean_change_error": change_error,
        "change_quantiles": _quantiles(change, _CHANGE_QUANTILES),
        "rms_change": rms,
        "rms_change_error": square_error / (2 * rms) if square_error and rms else square_error,
        "same_top": same_top,
        "same_top_error": same_error,
    }


def divergence_block(summary: Mapping[str, Any]) -> str:
    """The summary of ``kld`` as `llama-perplexity --kl-divergence` prints it."""

    def line(name: str, width: int, value: float, error: float | None, unit: str = "") -> str:
        spread = "" if error is None else f" ± {error:10.6f}"
        return f"{name:<{width}}: {value:10.6f}{spread}{unit}"

    def percent(name: str, value: float, error: float | None = None) -> str:
        spread = "" if error is None else f" ± {100 * error:5.3f} "
        return f"{name}: {100 * value:6.3f}{spread}%"

    s = summary
    correlation = "n/a" if s["correlation"] is None else f"{100 * s['correlation']:6.2f}%"
    lines = [
        "====== Perplexity statistics ======",
        line("Mean PPL(Q)", 30, s["perplexity"], s["perplexity_error"]),
        line("Mean PPL(base)", 30, s["backbone_perplexity"], s["backbone_perplexity_error"]),
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {correlation}",
        line("Mean ln(PPL(Q)/PPL(base))", 30, s["log_ratio"], s["log_ratio_error"]),
        line("Mean PPL(Q)/PPL(base)", 30, s["ratio"], s["ratio_error"]),
        line("Mean PPL(Q)-PPL(base)", 30, s["difference"], s["difference_error"]),
        "",
        "====== KL divergence statistics ======",
        line("Mean    KLD", 11, s["mean_kld"], s["mean_kld_error"]),
        *(line(f"{n} KLD", 11, value, None) for n, value in _named(s["kld_quantiles"])),
        "",
        "====== Token probability statistics ======",
        percent("Mean    Δp", s["mean_change"], s["mean_change_error"]),
        *(percent(f"{name} Δp", value) for name, value in _named(s["change_quantiles"])),
        percent("RMS Δp    ", s["rms_change"], s["rms_change_error"]),
        percent("Same top p", s["same_top"], s["same_top_error"]),
    ]
    return "\n".join(lines)


def _named(quantiles: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    words = {"1": "Maximum", "0.5": "Median ", "0": "Minimum"}
    for name, value in quantiles.items():
        yield words.get(name, f"{100 * float(name):4.1f}%  "), value


def _quantiles(values: Sequence[float], shares: Sequence[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor(shares, dtype=torch.float64)
    )
    return {f"{share:g}": value for share, value in zip(shares, found.tolist(), strict=True)}


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(first) < 2:
        return None
    pair = torch.tensor([first, second], dtype=torch.float64)
    value = float(torch.corrcoef(pair)[0, 1])
    return None if math.isnan(value) else value


def _exponential(mean: float, error: float | None) -> tuple[float, float | None]:
    value = math.exp(mean)
    return value, None if error is None else value * error


def _joined(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for record in records for value in record[name]]
