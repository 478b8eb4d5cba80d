"""GGUF files, llama.cpp's format: the numbers, the weights and the tokenizer of a LLaMA in one.

A file is opened with `read`; `numbers`, `weights` and `tokenizer` take it from there.
Source: github.com/ggml-org/ggml, docs/gguf.md; how text is split: llama.cpp, src/llama-vocab.cpp.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.checkpoints import require
from models import rotary_frequencies

# llama.cpp's names and ours, as in checkpoints.py
NAMES = [
    ("token_embd.", "embed."),
    *(
        (f"blk.{{}}.{theirs}.", f"blocks.{{}}.{ours}.")
        for theirs, ours in (
            ("attn_norm", "norm1"),
            ("attn_q", "attn.q_proj"),
            ("attn_k", "attn.k_proj"),
            ("attn_v", "attn.v_proj"),
            ("attn_output", "attn.o_proj"),
            ("ffn_norm", "norm2"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        )
    ),
    ("output_norm.", "norm."),
    ("output.", "head."),
]
# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
# before merging, LLaMA 3 splits a text into these
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROWS = 1024  # of a weight are dequantised at once


def read(path: Path) -> Any:
    """The file as the `gguf` package reads it; the weights stay on the disk until they are asked.

    Raises OSError if it is missing or broken, ValueError if the package is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # for the package, a large vocabulary is seconds of work
def _read(path: Path, changed: int) -> Any:
    require("gguf", "a GGUF file")
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # whatever numpy says to broken bytes
        raise OSError(f"{path} is broken or no GGUF file ({error}); fetch it again") from error


def entry(file: Any, name: str, *default: Any) -> Any:
    """The value of a name in the file. Raises KeyError if it has none and there is no default."""
    if name in file.fields or not default:
        return file.fields[name].contents()
    return default[0]


# ----------------------------------------------------------------------------------------- model


def numbers(file: Any) -> dict:
    """LLaMA's arguments. Raises ValueError for what it does not have, KeyError for a lost entry."""
    kind = entry(file, "general.architecture")
    if kind != "llama":
        raise ValueError(f"this is a model of type '{kind}'; only 'llama' can be loaded")
    number = functools.partial(lambda name, *default: entry(file, f"llama.{name}", *default))
    if number("expert_count", 0):
        raise ValueError("this LLaMA has experts; only models without them can be loaded")
    dim, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", number("rope.dimension_count", dim // heads))
    if number("rope.dimension_count", head_dim) != head_dim:
        raise ValueError("this LLaMA turns a part of each head; only whole heads can be loaded")
    held = {tensor.name: tensor for tensor in file.tensors}
    base, scaling = number("rope.freq_base", 10000.0), None
    if "rope_freqs.weight" in held:
        scaling = llama3_scaling(torch.tensor(held["rope_freqs.weight"].data), head_dim, base)
    elif number("rope.scaling.type", "none") != "none":
        factor = number("rope.scaling.factor")
        scaling = {"rope_type": number("rope.scaling.type"), "factor": factor}
    return dict(
        vocab=int(held["token_embd.weight"].shape[1]),
        dim=dim,
        depth=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        hidden=number("feed_forward_length"),
        context=number("context_length"),
        tied="output.weight" not in held,
        head_dim=head_dim,
        eps=number("attention.layer_norm_rms_epsilon"),
        rope_base=base,
        rope_scaling=scaling,
    )


def llama3_scaling(divisors: Tensor, head_dim: int, base: float) -> dict:
    """LLaMA 3's rotary scaling, of which a file keeps only what divides every frequency, d/2.

    All published models share three of its four numbers; the fourth is the largest divisor.
    Raises ValueError if these numbers do not give the divisors.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": divisors.max().item(),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, stretched = (rotary_frequencies(head_dim, base, s) for s in (None, scaling))
    if plain.shape != divisors.shape or not torch.allclose(plain / stretched, divisors, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not LLaMA 3's; another scaling cannot be loaded")
    return scaling


class Packed(NamedTuple):
    """A weight as the file holds it, in blocks of few bits; of q and k, with permuted rows."""

    data: np.ndarray  # numbers or blocks, the rows first
    kind: Any  # the package's GGMLQuantizationType
    shape: torch.Size  # of the weight itself
    heads: int | None  # of q and k

    def to(self, dtype: torch.dtype, copy: bool = True) -> Tensor:
        """The weight in this type, dequantised by and by; a copy always.

        llama.cpp turns neighbouring channels (2i, 2i + 1) of a head where we turn (i, i + d/2), so
        its files have the rows of q and k in that order. Raises ValueError for an unknown kind.
        """
        from gguf import dequantize

        value = torch.empty(self.shape, dtype=dtype)
        rows, packed = value.view(-1, self.shape[-1]), self.data.reshape(-1, self.data.shape[-1])
        try:
            for i in range(0, len(rows), ROWS):
                part = dequantize(packed[i : i + ROWS], self.kind)
                rows[i : i + ROWS] = torch.tensor(part)
        except NotImplementedError as error:
            raise ValueError(f"weights of type {self.kind.name} cannot be read") from error
        except Exception as error:  # whatever numpy says to blocks of another shape
            raise ValueError(f"a weight of type {self.kind.name} is broken ({error})") from error
        if self.heads is None:
            return value
        return value.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).reshape(self.shape)


def weights(file: Any) -> Iterator[tuple[str, Packed]]:
    """Every weight by llama.cpp's name; rope_freqs is none, `numbers` has read it."""
    heads = {"attn_q.": entry(file, "llama.attention.head_count")}
    heads["attn_k."] = entry(file, "llama.attention.head_count_kv", heads["attn_q."])
    for tensor in file.tensors:
        if tensor.name != "rope_freqs.weight":
            permuted = next((n for part, n in heads.items() if part in tensor.name), None)
            shape = torch.Size(map(int, reversed(tensor.shape)))
            yield tensor.name, Packed(tensor.data, tensor.tensor_type, shape, permuted)


# ------------------------------------------------------------------------------------- tokenizer


def tokenizer(file: Any) -> tuple[Any, dict[str, str]]:
    """The file's tokenizer, one of the `tokenizers` package, and what its tokenizer_config.json is.

    Raises ValueError for a kind that is not known, KeyError for a lost entry.
    """
    from tokenizers import AddedToken, processors

    value = functools.partial(lambda name, *d: entry(file, f"tokenizer.ggml.{name}", *d))
    kind, tokens = value("model"), value("tokens")
    kinds = value("token_type", [NORMAL] * len(tokens))
    if kind == "gpt2":
        split = value("pre", "default")
        inner, begins = byte_level(tokens, value("merges"), split), split == "llama-bpe"
    elif kind == "llama":
        normal = [token for token, k in zip(tokens, kinds) if k == NORMAL]
        scores, unknown = value("scores"), value("unknown_token_id", None)
        inner = sentence_pieces(tokens, normal, scores, unknown, value("add_space_prefix", True))
        begins = True
    else:
        raise ValueError(f"its tokenizer is of type '{kind}'; only gpt2 and llama can be read")

    inner.add_tokens(
        [
            AddedToken(token, special=k != USER_DEFINED, normalized=False)
            for token, k in zip(tokens, kinds)
            if k in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {name: value(f"{theirs}_token_id", None) for theirs, name in named.items()}
    config = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    if value("add_bos_token", begins):
        begin = config["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, ids["bos"])]
        )
    if template := entry(file, "tokenizer.chat_template", None):
        config["chat_template"] = template
    return inner, {"tokenizer_class": "PreTrainedTokenizerFast"} | config


def byte_level(tokens: list[str], merges: list[str], split: str) -> Any:
    """GPT-2's kind: text is split as the name `split` says, then merged from bytes.

    Raises ValueError if the name is not known.
    """
    from tokenizers import Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    gpt2 = ByteLevel(add_prefix_space=False)
    splits = {
        "default": gpt2,
        "gpt-2": gpt2,
        "smollm": Sequence([Digits(individual_digits=True), gpt2]),
        "llama-bpe": Sequence(
            [
                Split(Regex(LLAMA_3), "isolated"),
                ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    if split not in splits:
        raise ValueError(
            f"its tokenizer splits text as '{split}' does; only {', '.join(splits)} can be read"
        )
    parts = [merge[1:].partition(" ") for merge in merges]  # a first space is the token's own
    pairs = [(merge[:1] + left, right) for merge, (left, _, right) in zip(merges, parts)]
    vocab = {token: i for i, token in enumerate(tokens)}
    # LLaMA 3 takes a piece that is a token as it is, whatever its merges would make of it
    inner = Tokenizer(models.BPE(vocab, pairs, ignore_merges=split == "llama-bpe"))
    inner.pre_tokenizer, inner.decoder = splits[split], decoders.ByteLevel()
    return inner


def sentence_pieces(
    tokens: list[str], normal: list[str], scores: list[float], unknown: int | None, space: bool
) -> Any:
    """SentencePiece's kind: of all neighbours the two that make the best-scored token are merged.

    What no token spells becomes bytes. normal: the tokens that are made of text; unknown: the
    number of what is no byte either; space: whether a text begins with one that it does not have.
    """
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import Metaspace

    vocab = {token: i for i, token in enumerate(tokens)}
    known = set(normal)
    merges = sorted(  # of two with one score, the longer left part goes first
        (-scores[vocab[token]], -cut, cut - len(token), vocab[token], token[:cut], token[cut:])
        for token in known
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    )
    model = models.BPE(
        vocab,
        [(left, right) for *_, left, right in merges],
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = Tokenizer(model)
    inner.pre_tokenizer = Metaspace(prepend_scheme="first" if space else "never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if space else []
    inner.decoder = decoders.Sequence(steps)
    return inner
