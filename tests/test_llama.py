"""models.py: LLaMA is transformers' own, with any mask and cache, and its links are METHOD.md's."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import propagated_nowhere, reaching_new_functions
from torch import nn

import models
import san
from lab import llama
from models import LLAMA_MICRO, LLaMA
from san import Link

TINY = dict(vocab=19, dim=16, depth=2, heads=4, kv_heads=2, hidden=24, context=32, head_dim=6)
NO_TRANSFORMERS = "the reference is transformers' LLaMA; pip install transformers"


pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter gets a value that matters: fresh weights are small, fresh norms all ones."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(mean=1, std=0.3)
        else:
            parameter.normal_(std=1 if "embed" in name else parameter.shape[1] ** -0.5)
    return model.eval()


def tiny_llama(**changes) -> LLaMA:
    return randomise(LLaMA(**{**TINY, **changes}))


def random_tokens(count: int, batch: int = 2, vocab: int = 19, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, count), generator=generator)  # B N


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, tokens: torch.Tensor) -> float:
    return (one(tokens) - other(tokens)).abs().max().item()


# ----------------------------------------------------------------------- the real architecture


def rope(kind: str, **numbers) -> dict:
    return {"rope_type": kind, "rope_theta": 500.0, **numbers}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
    original_max_position_embeddings=24,
)
LINEAR = rope("linear", factor=2.5)
VARIANTS = {
    "grouped": {},
    "one key a query": dict(num_key_value_heads=4),
    "one key in all": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=10),
    "linear": dict(rope_parameters=LINEAR),
    "llama3": dict(rope_parameters=LLAMA3, head_dim=12),
}


def theirs(**changes) -> nn.Module:
    """A small LLaMA of transformers; its epsilon and its base are such that a mistake shows."""
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    numbers = dict(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        rms_norm_eps=0.01,
        rope_parameters=rope("default"),
        bos_token_id=None,
        eos_token_id=None,
    )
    config = transformers.LlamaConfig(**{**numbers, **changes})
    return randomise(transformers.LlamaForCausalLM(config))


def save(model: nn.Module, folder: Path, **settings) -> Path:
    pytest.importorskip("safetensors", reason="weights are saved as safetensors")
    model.save_pretrained(folder, **settings)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[nn.Module, Path]:
    """transformers' model and the folder it was saved to, which no test may change."""
    model = theirs()
    return model, save(model, tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of that folder, for tests that break it."""
    return Path(shutil.copytree(original[1], tmp_path / "copy"))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_model_loads_and_gives_the_same_logits(variant, tmp_path):
    real = theirs(**VARIANTS[variant])
    own = llama.load_llama(save(real, tmp_path))
    for count in (1, 7, 40):  # 40 is beyond the context of 32, and of llama3's original 24
        tokens = random_tokens(count)
        expected = real(tokens).logits
        assert expected.std() > 0.1  # the logits say something
        assert (own(tokens) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("variant", ["grouped", "tied", "llama3"])
def test_greedy_generation_gives_the_tokens_of_transformers(variant, tmp_path):
    real = theirs(**VARIANTS[variant])
    own = llama.load_llama(save(real, tmp_path))
    prompt = random_tokens(5, batch=1)
    expected = real.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
    )
    assert models.generate(own, prompt[0].tolist(), count=30) == expected[0, 5:].tolist()


def forget_the_scaling(model):
    model.config["rope_scaling"] = None


def use_another_base(model):
    model.config["rope_base"] = 10000.0


def use_another_epsilon(model):
    for module in model.modules():
        if isinstance(module, models.RMSNorm):
            module.eps = 1e-6


def swap_gate_and_up(model):
    mlp = model.blocks[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def swap_the_key_heads(model):
    weight = model.blocks[0].attn.k_proj.weight.data
    weight.copy_(weight.roll(len(weight) // 2, dims=0))


@torch.no_grad()
@pytest.mark.parametrize(
    "mistake",
    [
        forget_the_scaling,
        use_another_base,
        use_another_epsilon,
        swap_gate_and_up,
        swap_the_key_heads,
    ],
)
def test_a_mistake_in_the_model_shows_in_the_logits(mistake, tmp_path):
    real = theirs(rope_parameters=LLAMA3)
    own, tokens = llama.load_llama(save(real, tmp_path)), random_tokens(40)
    mistake(own)
    assert (own(tokens) - real(tokens).logits).abs().max() > 1e-2


# ------------------------------------------------------------------------------------- loading


def test_shards_load_as_one_file_does(original, tmp_path):
    real, whole = original
    save(real, tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    sharded, single = llama.load_llama(tmp_path), llama.load_llama(whole)
    assert sharded.state_dict().keys() == single.state_dict().keys()
    for key, value in sharded.state_dict().items():
        assert torch.equal(value, single.state_dict()[key]), key


def test_bfloat16_weights_load_as_they_are_with_float32_norms(original, tmp_path):
    real = copy.deepcopy(original[0])
    for parameter in real.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save(copy.deepcopy(real).bfloat16(), tmp_path)
    own = llama.load_llama(tmp_path, dtype=torch.bfloat16)
    for name, parameter in own.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    tokens = random_tokens(7)
    wide = llama.load_llama(tmp_path, dtype=torch.float32)
    assert difference(wide, lambda tokens: real(tokens).logits, tokens) < 1e-4
    assert own(tokens).dtype == torch.bfloat16
    assert difference(own, wide, tokens) < 0.15  # bfloat16 keeps 8 bits


def test_rotary_angles_keep_their_precision_in_bfloat16():
    tokens, positions = random_tokens(4, batch=1), torch.tensor([[0, 3001, 7013, 9007]])
    rough = tiny_llama(rope_base=50.0).bfloat16()
    fine = copy.deepcopy(rough).float()
    with torch.no_grad():
        assert (rough(tokens, positions) - fine(tokens, positions)).abs().max() < 0.15
        assert (fine(tokens, positions) - fine(tokens, positions + positions % 2)).std() > 0.05


def test_a_tied_head_is_one_weight_even_if_the_file_holds_both(tmp_path):
    own = llama.load_llama(save(theirs(tie_word_embeddings=True), tmp_path))
    assert own.head.weight is own.embed.weight
    change_weights(tmp_path, lambda state: state.update({"lm_head.weight": torch.zeros(3)}))
    again = llama.load_llama(tmp_path)
    assert again.head.weight is again.embed.weight
    assert torch.equal(again.head.weight, own.head.weight)


def test_the_frequencies_of_older_files_are_ignored(original, folder):
    def add(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    change_weights(folder, add)
    assert difference(*map(llama.load_llama, (original[1], folder)), random_tokens(7)) == 0


def test_an_older_config_says_the_same(original, tmp_path):
    """No key-value heads, no head_dim, and the rotary numbers in two entries, `type` among them."""
    save(theirs(num_key_value_heads=4, rope_parameters=LINEAR), tmp_path)
    new = llama.load_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings"):
        config.pop(key, None)
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(new, llama.load_llama(tmp_path), random_tokens(7)) == 0


def test_the_loaded_model_does_not_hang_on_its_file(folder):
    model, tokens = llama.load_llama(folder), random_tokens(7)
    before = model(tokens)
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(model(tokens), before)


# ------------------------------------------------------------------------- what loading refuses


def change_weights(folder: Path, change) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="weights are safetensors")
    path = folder / "model.safetensors"
    state = safetensors.load(path.read_bytes())
    change(state)
    path.write_bytes(safetensors.save(state))


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v != "remove"}
    (folder / "config.json").write_text(json.dumps(config))


def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install -r requirements-extra.txt"):
        llama.load_llama(tmp_path)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(model_type="mistral"), "'mistral'"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(hidden_act="gelu"), "'gelu'"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
        (dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'"),
        (dict(num_attention_heads=3), "3 query heads.* 2 key-value heads"),
        (dict(head_dim=3), "even .*3"),
        (dict(hidden_size="wide"), "config.json"),
    ],
)
def test_another_architecture_is_refused_by_name(changes, named, folder):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=named):
        llama.load_llama(folder)


@pytest.mark.parametrize(
    "key",
    ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    + ["intermediate_size", "max_position_embeddings", "rms_norm_eps"],
)
def test_a_missing_entry_of_the_config_is_named(key, folder):
    change_config(folder, **{key: "remove"})
    with pytest.raises(OSError, match=f"config.json has no entry '{key}'"):
        llama.load_llama(folder)


def test_a_missing_number_of_the_rotary_scaling_is_named(folder):
    change_config(folder, rope_parameters={"rope_type": "linear"})
    with pytest.raises(OSError, match="config.json has no entry 'factor'"):
        llama.load_llama(folder)


def remove_the_folder(folder):
    shutil.rmtree(folder)


def remove_the_config(folder):
    (folder / "config.json").unlink()


def break_the_config(folder):
    (folder / "config.json").write_text("{")


def make_the_config_a_list(folder):
    (folder / "config.json").write_text("[]")


def remove_the_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_the_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def write_an_index(folder, content):
    remove_the_weights(folder)
    (folder / "model.safetensors.index.json").write_text(content)


def name_a_shard_that_is_not_there(folder):
    write_an_index(folder, '{"weight_map": {"model.norm.weight": "model-2.safetensors"}}')


def break_the_index(folder):
    write_an_index(folder, "{")


def make_the_index_say_nothing(folder):
    write_an_index(folder, "{}")


@pytest.mark.parametrize(
    "change, named",
    [
        (remove_the_folder, "no folder .*copy"),
        (remove_the_config, "no file .*config.json"),
        (break_the_config, "config.json is broken"),
        (make_the_config_a_list, "config.json is broken"),
        (remove_the_weights, "no model.safetensors in .*copy"),
        (cut_the_weights, "model.safetensors is broken"),
        (empty_the_weights, "model.safetensors is broken"),
        (name_a_shard_that_is_not_there, "no file .*model-2.safetensors"),
        (break_the_index, "index.json is broken"),
        (make_the_index_say_nothing, "index.json is broken"),
    ],
)
def test_a_missing_or_broken_file_is_named(change, named, folder):
    change(folder)
    with pytest.raises(OSError, match=named):
        llama.load_llama(folder)


def leave_a_tensor_out(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def add_a_tensor(state):
    state["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(16)


def add_a_layer(state):
    state["model.layers.2.input_layernorm.weight"] = torch.ones(16)


def widen_a_tensor(state):
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(25, 16)


@pytest.mark.parametrize(
    "change, named",
    [
        (leave_a_tensor_out, r"blocks\.1\.mlp\.up_proj\.weight missing"),
        (add_a_tensor, r"model\.layers\.1\.self_attn\.q_proj\.bias \(16 .*missing in the model"),
        (add_a_layer, r"model\.layers\.2\.input_layernorm\.weight \(16 .*missing in the model"),
        (widen_a_tensor, r"model\.layers\.0\.mlp\.up_proj\.weight \(25×16 .*24×16 in the model"),
    ],
)
def test_a_tensor_that_does_not_fit_the_config_is_named(change, named, folder):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=named):
        llama.load_llama(folder)


# ------------------------------------------------------------------------------------ building


@pytest.mark.parametrize("tied", [False, True])
def test_the_config_rebuilds_the_model_from_a_checkpoint(tied, tmp_path):
    model = tiny_llama(tied=tied, eps=0.01, rope_base=100.0, rope_scaling=LINEAR)
    san.write({"config": model.config, "state": model.state_dict()}, tmp_path / "model.pt")
    content = san.read(tmp_path / "model.pt")
    again = LLaMA(**content["config"])
    again.load_state_dict(content["state"])
    assert difference(model, again, random_tokens(7)) == 0
    assert (again.head.weight is again.embed.weight) == tied
    assert again.context == TINY["context"]


def test_fresh_weights_have_a_deviation_of_one_over_the_root_of_the_width_and_no_biases():
    model = LLaMA(vocab=50, **LLAMA_MICRO)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std() * LLAMA_MICRO["dim"] ** 0.5 - 1) < 0.1, name
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(head_dim=None, dim=18), "18 channels.*4 heads"),
        (dict(kv_heads=3), "4 query heads.*3 key-value heads"),
        (dict(head_dim=5), "even.*5"),
        (dict(rope_scaling={"type": "yarn"}), "'yarn'.*linear or llama3"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_llama(**changes)


# --------------------------------------------------------------------- masks, cache, generation


@torch.no_grad()
def test_no_token_sees_those_after_it():
    model, tokens = tiny_llama(), random_tokens(9)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 19
    moved = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert (moved[:4] == 0).all() and (moved[4:] > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("parts", [[4, 5], [1, 8], [8, 1], [3, 3, 3], [1] * 9])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_text_in_parts_through_the_cache_gives_the_logits_of_the_whole(parts, kv_heads):
    model, tokens, cache = tiny_llama(kv_heads=kv_heads), random_tokens(9), [None, None]
    logits = torch.cat([model(part, cache=cache) for part in tokens.split(parts, dim=1)], dim=1)
    assert (logits - model(tokens)).abs().max() < 1e-5
    assert all(t.shape == (2, kv_heads, 9, 6) for pair in cache for t in pair)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_a_tree_of_two_endings_gives_the_logits_of_two_texts(cached):
    model = tiny_llama()
    start, one, other = random_tokens(11, batch=1).split([5, 3, 3], dim=1)
    positions = torch.tensor([[*range(5), 5, 6, 7, 5, 6, 7]])
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[8:, 5:8] = False  # the second ending does not see the first
    if cached:
        cache, ends = [None, None], torch.cat([one, other], dim=1)
        model(start, cache=cache)
        logits = model(ends, positions[:, 5:], mask[None, None, 5:], cache)
    else:
        logits = model(torch.cat([start, one, other], dim=1), positions, mask[None, None])[:, 5:]
    for ending, got in zip((one, other), logits.split(3, dim=1)):
        expected = model(torch.cat([start, ending], dim=1))[:, 5:]
        assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_a_padded_batch_with_a_mask_gives_the_logits_of_each_text():
    model, tokens = tiny_llama(), random_tokens(6)
    padding = torch.tensor([2, 0])  # places at the left that hold nothing
    place = torch.arange(6)
    real = place >= padding[:, None]  # B N
    mask = torch.ones(6, 6, dtype=torch.bool).tril() & (real[:, None] | torch.eye(6).bool())
    logits = model(tokens, (place - padding[:, None]).clamp(min=0), mask[:, None])
    assert (logits[0, 2:] - model(tokens[:1, 2:])[0]).abs().max() < 1e-5
    assert (logits[1] - model(tokens[1:])[0]).abs().max() < 1e-5


@torch.no_grad()
def test_only_the_distance_between_positions_matters():
    model, tokens = tiny_llama(), random_tokens(6)
    positions = torch.arange(6).expand(2, -1)
    assert (model(tokens, positions + 11) - model(tokens)).abs().max() < 1e-4
    assert (model(tokens, positions * 2) - model(tokens)).abs().max() > 1e-2


@torch.no_grad()
def test_generation_with_the_cache_is_generation_without():
    model, tokens = tiny_llama(), [3, 1, 4]
    for _ in range(12):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    assert models.generate(model, [3, 1, 4], count=12) == tokens[3:]


def test_generation_ends_before_the_stop_token_or_after_the_count():
    model = tiny_llama()
    tokens = models.generate(model, [3, 1, 4], count=12)
    stop = tokens[6]
    assert models.generate(model, [3, 1, 4], 12, stop) == tokens[: tokens.index(stop)]
    assert models.generate(model, [3, 1, 4], count=2) == tokens[:2]
    assert models.generate(model, [3, 1, 4], count=0) == []


def test_prompts_of_several_lengths_are_continued_as_each_alone():
    model, prompts = tiny_llama(), [[3, 1, 4], [7], [5, 9, 2, 6, 5, 3], [8, 9, 7]]
    alone = [models.generate(model, prompt, count=12) for prompt in prompts]
    assert models.generate_batch(model, prompts, count=12) == alone
    assert len({*map(tuple, alone)}) == len(prompts)
    stop = alone[0][4]
    ends = [models.generate(model, prompt, 12, stop) for prompt in prompts]
    assert models.generate_batch(model, prompts, 12, stop) == ends and len(ends[0]) < 12


# --------------------------------------------------------------------------------------- links


def test_the_links_are_those_of_the_method():
    links = tiny_llama(head_dim=2).links()
    assert [(layer, anterior, index and list(index)) for layer, anterior, index in links] == [
        ("blocks.0.attn.q_proj", None, None),
        ("blocks.0.attn.k_proj", None, None),
        ("blocks.0.attn.v_proj", None, None),
        ("blocks.0.attn.o_proj", "blocks.0.attn.v_proj", [0, 1, 0, 1, 2, 3, 2, 3]),
        ("blocks.0.mlp.gate_proj", "blocks.0.attn.o_proj", None),
        ("blocks.0.mlp.up_proj", "blocks.0.attn.o_proj", None),
        ("blocks.0.mlp.down_proj", "blocks.0.mlp.up_proj", None),
        ("blocks.1.attn.q_proj", "blocks.0.mlp.down_proj", None),
        ("blocks.1.attn.k_proj", "blocks.0.mlp.down_proj", None),
        ("blocks.1.attn.v_proj", "blocks.0.mlp.down_proj", None),
        ("blocks.1.attn.o_proj", "blocks.1.attn.v_proj", [0, 1, 0, 1, 2, 3, 2, 3]),
        ("blocks.1.mlp.gate_proj", "blocks.1.attn.o_proj", None),
        ("blocks.1.mlp.up_proj", "blocks.1.attn.o_proj", None),
        ("blocks.1.mlp.down_proj", "blocks.1.mlp.up_proj", None),
    ]
    assert all(isinstance(link, Link) for link in links)


def test_every_layer_but_the_head_is_linked():
    model = tiny_llama()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {link.layer for link in model.links()} == layers - {"head"}


@pytest.mark.parametrize("tied", [False, True])
def test_links_attach_and_leave_the_output_exactly_as_it_was(tied):
    model = tiny_llama(tied=tied)
    base = copy.deepcopy(model)
    san.attach(model, model.links(), trainable=["norm"])
    assert difference(base, model, random_tokens(7)) == 0
    assert len(san.summary(model)["layers"]) == len(base.links())


def test_these_scales_are_propagated_nowhere():
    model = tiny_llama()  # 4 heads of q and 2 of k and v, each of 6 channels
    once = {"attn.q_proj": 24, "attn.k_proj": 12, "mlp.gate_proj": 24}
    expected = {f"blocks.{i}.{name}": [*range(n)] for i in range(2) for name, n in once.items()}
    expected["blocks.1.mlp.down_proj"] = [*range(16)]
    assert propagated_nowhere(model, model.links()) == expected


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "norms, expected", [(True, []), (False, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])]
)
def test_propagation_reaches_new_functions_in_these_layers_alone(norms, expected, kv_heads):
    model = tiny_llama(kv_heads=kv_heads).double()
    links, tokens = model.links(), random_tokens(7, batch=40)
    reaching = reaching_new_functions(model, links, tokens, shift=False, norms=norms)
    linked = {link.layer for link in links if link.anterior is not None}
    assert reaching == {layer for layer in linked if layer.endswith(tuple(expected))}


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """With SAN layers whose γ are as far from one as training might bring them, and farther."""
    san.attach(model, model.links())
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.normal_(mean=1, std=0.3)
    return model


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cheap_form_is_the_explicit_form_and_the_merged_model(kv_heads):
    cheap = trained(tiny_llama(kv_heads=kv_heads).double())
    explicit = copy.deepcopy(cheap)
    for module in explicit.modules():
        if isinstance(module, san.SANLayer):
            module.forward = module.forward_explicit
    tokens = random_tokens(7)
    gradients = []
    for model in (cheap, explicit):
        model(tokens).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert difference(cheap, explicit, tokens) < 1e-10
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    merged = copy.deepcopy(cheap)
    san.merge(merged)
    assert difference(cheap, merged, tokens) < 1e-10
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()


# The two exact rows of the table: γ on the posterior's columns is γ on the anterior's own output.
@pytest.mark.parametrize("layer", ["blocks.0.attn.v_proj", "blocks.1.mlp.up_proj"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_propagating_a_scale_scales_the_anterior_layer_itself(layer, kv_heads):
    base = tiny_llama(kv_heads=kv_heads).double()
    weight = base.get_submodule(layer).weight
    gamma = torch.linspace(-1, 2, len(weight), dtype=torch.float64)
    adapted, explicit = copy.deepcopy(base), copy.deepcopy(base)
    san.attach(adapted, adapted.links(), scale=False)
    adapted.get_submodule(layer).gamma.data.copy_(gamma)
    explicit.get_submodule(layer).weight.data *= gamma[:, None]
    tokens = random_tokens(7)
    assert difference(base, adapted, tokens) > 0.01
    assert difference(explicit, adapted, tokens) < 1e-12


def test_a_bfloat16_model_trains_its_scales_and_float32_norms():
    model = tiny_llama().bfloat16()
    for module in model.modules():
        if isinstance(module, models.RMSNorm):
            module.float()
    san.attach(model, model.links(), trainable=["norm", "blocks.0.norm1"])
    model(random_tokens(7)).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert parameter.grad.abs().sum() > 0, name
