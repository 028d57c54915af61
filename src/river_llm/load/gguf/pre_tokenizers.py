"""How a BPE tokenizer's text is cut before its merges, by `tokenizer.ggml.pre`.

A kind is what the tokenizer.json of the model that it is named after says; the names are
llama.cpp's (src/llama-vocab.cpp). A pattern cuts what the ones before it left; what it matches and
what lies between its matches are pieces.
"""

# ruff: noqa: RUF001 (characters of many scripts are what it is about)
from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = rf"(?i:{_CONTRACTIONS})"
_BLANKS = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_BLANKS}"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_LINES = r"\s*[\r\n]+"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"


def _like_gpt4(
    numbers: str,
    *,
    contractions: str = f"{_ANY_CASE}|",
    word: str = r"[^\r\n\p{L}\p{N}]?\p{L}+",
    signs: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    lines: str = _LINES,
) -> str:
    """The pattern of GPT-4's tokenizer, from which most later ones differ in a part."""
    return f"{contractions}{word}|{numbers}|{signs}|{lines}|{_BLANKS}"


# A word begins with capitals and goes on in small letters, as GPT-4o's tokenizer has it.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _like_gpt4o(numbers: str, ending: str = f"{_ANY_CASE}?") -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}|{_BLANKS}"


_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3_WORDS = rf"{_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_BLANKS}"
_LETTERS_WITH_CASE = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ"
    "-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹ"
    "ℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True)
class PreTokenization:
    """One kind of cutting.

    Attributes:
        patterns: applied in order.
        ignore_merges: a piece that is a token is one, whatever the merges say.
        add_bos: a raw text begins with BOS, unless the file says otherwise.
        is_sentencepiece: blanks are ▁, and unknown characters are bytes <0x..>, in place of GPT-2's
            letters for bytes.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    is_sentencepiece: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Of the tokenizers package."""
        splits: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(one), "isolated") for one in self.patterns
        ]
        if not self.is_sentencepiece:
            splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(splits)


def _kinds() -> dict[str, PreTokenization]:
    llama3, qwen2 = _like_gpt4(_DIGITS), _like_gpt4(_DIGIT)
    digits_then_gpt2 = (_DIGIT, _GPT2)
    same: dict[tuple[str, ...], tuple[str, ...]] = {
        ("smaug-bpe", "dbrx", "chatglm-bpe"): (llama3,),
        (
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ): digits_then_gpt2,
        (
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ): (_GPT2,),
        (
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "megrez",
            "hunyuan",
            "solar-open",
            "grok-2",
        ): (qwen2,),
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): (_DIGITS, _CJK, _DEEPSEEK3),
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"): (_like_gpt4o(_DIGITS),),
        ("poro-chat", "bloom", "gpt3-finnish"): (_BLOOM,),
        ("bailingmoe", "bailingmoe2", "llada-moe"): (
            _like_gpt4(_DIGIT, contractions=r"'(?i:[sdmt]|ll|ve|re)|", lines=r"\s*[\r\n]"),
        ),
        ("tiny_aya", "cohere2moe"): (r"\d{1,3}(?=(?:\d{3})*\b)", _like_gpt4o(_DIGITS)),
    }
    kinds = {name: PreTokenization(one) for names, one in same.items() for name in names}
    llama_names = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")
    for name in (*llama_names, "midm-2.0", "lfm2", "jina-v5-nano"):
        kinds[name] = PreTokenization((llama3,), ignore_merges=True, add_bos=True)
    for name in ("glm4", "glm5"):
        kinds[name] = PreTokenization((llama3,), ignore_merges=True)
    for name in ("gemma4", "granite-embed-multi-311m"):
        kinds[name] = PreTokenization((r"[^\n]+|[\n]+",), add_bos=True, is_sentencepiece=True)
    return kinds | {
        "default": PreTokenization((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "falcon": PreTokenization((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
        "deepseek-llm": PreTokenization(
            (
                r"[\r\n]",
                rf"\s?[{_LETTERS_WITH_CASE}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"\s+$",
                "[一-龥ࠀ-一가-퟿]+",
                r"\p{N}+",
            )
        ),
        "deepseek-coder": PreTokenization(
            (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT)
        ),
        "spark2_5": PreTokenization(
            (
                _DIGITS,
                _CJK,
                rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_BLANKS}",
                _DIGIT,
            )
        ),
        "youtu": PreTokenization(
            (
                "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
                _like_gpt4o(_DIGIT),
            ),
            ignore_merges=True,
        ),
        "qwen35": PreTokenization(
            (
                _like_gpt4(
                    _DIGIT,
                    word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                    signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                ),
            )
        ),
        "jais-2": PreTokenization(
            (
                rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{_DIGITS}| ?[^\s\p{{L}}\p{{N}}]+"
                rf"[\r\n]*|{_LINES}|"
                + "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1))
                + r"|\s{1,2}(?!\S)|\s{1}",
            )
        ),
        "viking": PreTokenization((_BLOOM, _DIGIT)),
        "tekken": PreTokenization(
            (_like_gpt4o(_DIGIT, ending=""),), ignore_merges=True, add_bos=True
        ),
        "chameleon": PreTokenization(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                _DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
        "granite-embed-multi-97m": PreTokenization((_like_gpt4o(_DIGITS),), ignore_merges=True),
        "kimi-k2": PreTokenization(
            (
                r"[\p{Han}]+",
                _like_gpt4o(_DIGITS)
                .replace(_UPPER, rf"[{_UPPER[1:-1]}&&[^\p{{Han}}]]")
                .replace(_LOWER, rf"[{_LOWER[1:-1]}&&[^\p{{Han}}]]")
                .replace("/]*", "]*"),
            )
        ),
        "superbpe": PreTokenization((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
        "seed-coder": PreTokenization((_like_gpt4(_DIGIT, signs=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
        "ufakzeka": PreTokenization((_like_gpt4(_DIGIT, contractions=""),)),
        "afmoe": PreTokenization(
            (
                r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
                "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
                _DEEPSEEK3,
            )
        ),
        "laguna": PreTokenization((r"[^\n]+|[\n]+", qwen2)),
        "exaone-moe": PreTokenization(
            (
                _like_gpt4(
                    _DIGIT,
                    word=r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    lines=r"\s*[\r\n]",
                ),
            )
        ),
        "sarvam-moe": PreTokenization((r"[^\n]+|[\n]+",), is_sentencepiece=True),
        "minicpm5": PreTokenization((_DIGITS, _like_gpt4(r"\p{N}+")), ignore_merges=True),
    }


KINDS = _kinds()
