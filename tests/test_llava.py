"""models.py: LLaVA is transformers' own, reads pictures wherever they stand, and merges exactly."""

import copy
import json

import pytest
import torch
from tiny import propagated_nowhere, randomise
from torch import Tensor, nn

import models
import san
from lab import llava, visual
from lab.batches import to_input
from lab.propose import propose
from models import LLaVA
from san import Link

PICTURE = 7
TOWER = dict(image_size=16, patch=4, dim=8, depth=2, heads=2)
TEXT = dict(vocab=19, dim=16, depth=2, heads=4, kv_heads=2, hidden=24, context=64)
NO_TRANSFORMERS = "the reference is transformers' LLaVA; pip install transformers"

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_llava(pool: int = 2, **changes) -> LLaVA:
    return randomise(LLaVA(TOWER, PICTURE, pool, **TEXT | changes))


def random_images(count: int, size: int = 16, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def text(places: int, before: int, after: int, seed: int = 1) -> list[int]:
    """Random tokens with one picture's places among them; −1 places: without."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8, 19, (before + after,), generator=generator).tolist()
    return [*words[:before], *[PICTURE] * places, *words[before:]]


def batch(model: LLaVA, count: int = 2, before: int = 2, after: int = 5) -> Tensor:
    return torch.tensor([text(model.places, before, after, seed=i) for i in range(count)])


# ----------------------------------------------------------------------- the real architecture


def theirs(**changes) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    vision = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        layer_norm_eps=1e-6,
    )
    language = transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        rms_norm_eps=0.01,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = transformers.LlavaConfig(
        **dict(vision_config=vision, text_config=language, image_token_index=PICTURE) | changes
    )
    return randomise(transformers.LlavaForConditionalGeneration(config))


def saved(model: nn.Module, folder) -> LLaVA:
    pytest.importorskip("safetensors", reason="weights are saved as safetensors")
    model.save_pretrained(folder)
    return llava.load(folder)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
def test_transformers_model_loads_and_gives_the_same_logits(layer, tmp_path):
    real = theirs(vision_feature_layer=layer)
    own = saved(real, tmp_path)
    assert isinstance(own, LLaVA) and len(own.tower.blocks) == 4 + layer
    tokens, images = batch(own), random_images(2)
    expected = real(input_ids=tokens, pixel_values=images).logits
    other = real(input_ids=tokens, pixel_values=images.flip(0)).logits
    assert (expected - other).abs().max() > 0.1  # the pictures decide something
    assert (own(tokens, images=images) - expected).abs().max() < 1e-4
    words = tokens.clamp(min=PICTURE + 1)
    assert (own(words) - real(input_ids=words).logits).abs().max() < 1e-4


@torch.no_grad()
def test_another_tower_is_compared_from_the_projector_on_with_its_features_given(monkeypatch):
    """transformers' default tower is CLIP's: its features are handed to our projector."""
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    clip = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    real = theirs(vision_config=clip)
    own, images = tiny_llava(pool=1, eps=0.01), random_images(2)
    vision = real.model.vision_tower(pixel_values=images, output_hidden_states=True)
    monkeypatch.setattr(own.tower, "stream", lambda _: vision.hidden_states[-2])
    state = {
        llava.rename(llava.plain(key), llava.NAMES + llava.llama.NAMES): value
        for key, value in real.state_dict().items()
        if "vision" not in key
    }
    missing = own.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(k.startswith("tower") for k in missing.missing_keys)
    tokens = batch(own)
    expected = real(input_ids=tokens, pixel_values=images).logits
    assert (own(tokens, images=images) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_greedy_generation_gives_the_tokens_of_transformers(tmp_path):
    real = theirs()
    own, images = saved(real, tmp_path), random_images(1)
    prompt = batch(own, count=1)
    expected = real.generate(
        input_ids=prompt,
        pixel_values=images,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
    )[0, prompt.shape[1] :].tolist()
    assert models.generate(own, prompt[0].tolist(), count=12, images=images) == expected


HALF = dict(image_mean=[0.5] * 3, image_std=[0.25, 0.5, 1])
PROCESSORS = {"preprocessor_config.json": HALF, "processor_config.json": {"image_processor": HALF}}


@torch.no_grad()
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_tower_reads_pixels_normalised_as_its_processor_says(name, tmp_path):
    real, pixels = theirs(), torch.rand(2, 3, 16, 16)
    (tmp_path / name).write_text(json.dumps(PROCESSORS[name]))
    own = saved(real, tmp_path)
    mean, std = (torch.tensor(HALF[key]).view(3, 1, 1) for key in HALF)
    tokens = batch(own)
    expected = real(input_ids=tokens, pixel_values=(pixels - mean) / std).logits
    assert (own(tokens, images=to_input(255 * pixels)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("numbers", [0.5, [0.5] * 2, [0.5, 0, 0.5], [0.5, "x", 1], None])
def test_a_processor_without_three_numbers_is_named(numbers, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(HALF | {"image_std": numbers}))
    with pytest.raises(OSError, match=f"{path} is broken: 'image_std'"):
        llava.pixels(tmp_path)
    path.write_text('{"image_processor": 3}')
    assert llava.pixels(tmp_path) == []


def test_its_tokenizer_ends_a_text_as_the_text_config_says(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="it reads tokenizer.json")
    own = saved(theirs(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["eos_token_id"] = 3
    path.write_text(json.dumps(config))
    words = {f"w{i}": i for i in range(PICTURE)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.add_special_tokens([visual.IMAGE])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = llava.llama.LlamaTokenizer(tmp_path)
    assert tokenizer.end == 3
    visual.require_token(own, tokenizer)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda c: c["vision_config"].update(model_type="clip_vision_model"), "clip_vision_model"),
        (lambda c: c.pop("vision_config"), "clip_vision_model"),  # what they take it for
        (lambda c: c["vision_config"].update(hidden_act="quick_gelu"), "quick_gelu"),
        (lambda c: c["vision_config"].update(qkv_bias=False), "qkv_bias is False"),
        (lambda c: c["vision_config"].update(num_channels=1), "num_channels is 1"),
        (lambda c: c["vision_config"].update(layer_norm_eps=1e-5), "layer_norm_eps"),
        (lambda c: c["vision_config"].pop("layer_norm_eps"), "layer_norm_eps is 1e-12"),
        (lambda c: c["vision_config"].update(intermediate_size=24), "intermediate_size"),
        (lambda c: c["text_config"].update(model_type="mistral"), "mistral"),
        (lambda c: c.update(vision_feature_layer=[-2, -1]), "vision_feature_layer"),
        (lambda c: c.update(vision_feature_select_strategy="full"), "full"),
        (lambda c: c.update(projector_hidden_act="relu"), "relu"),
    ],
)
def test_another_architecture_is_refused_by_name(change, named, tmp_path):
    saved(theirs(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        llava.load(tmp_path)


# ------------------------------------------------------------------------- pictures within a text


@torch.no_grad()
def test_a_batch_mixes_texts_with_no_one_and_two_pictures():
    model, images = tiny_llava(), random_images(3)
    one = text(model.places, 3, 8)
    two = [*text(model.places, 1, 1), *text(model.places, 1, 4, seed=3)][: len(one)]
    none = text(0, 4, 8 + 3 + model.places - 4, seed=4)
    rows = [one, none, two]
    assert len({*map(len, rows)}) == 1
    mixed = model(torch.tensor(rows), images=images)
    for row, own in ((0, images[:1]), (1, None), (2, images[1:])):
        alone = model(torch.tensor([rows[row]]), images=own)
        assert (mixed[row] - alone[0]).abs().max() < 1e-5
    assert (mixed[0] - model(torch.tensor([one]), images=images[1:2])[0]).abs().max() > 0.01


def test_pictures_that_do_not_fill_their_places_are_refused():
    model = tiny_llava()
    with pytest.raises(ValueError, match="3 pictures do not fill 8 places"):
        model(batch(model), images=random_images(3))


@pytest.mark.parametrize("changes", [dict(pool=3), dict(picture=19)])
def test_arguments_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(ValueError, match="patches a side"):
        LLaVA(**dict(tower=TOWER, picture=PICTURE, pool=2) | changes, **TEXT)


@torch.no_grad()
def test_pooled_patches_are_neighbours_read_row_by_row():
    model = tiny_llava()
    seen = []
    model.projector.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = random_images(1)
    model.see(images)
    patches = model.tower.stream(images)[0, 1:].view(4, 4, 8)
    second = torch.cat([patches[0, 2], patches[0, 3], patches[1, 2], patches[1, 3]])
    assert seen[0].shape == (1, 4, 32) and torch.equal(seen[0][0, 1], second)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 6, 8, 10])
def test_a_text_in_parts_through_the_cache_gives_the_logits_of_the_whole(cut):
    """The picture's four places, 2 to 5, come whole in one of the two parts."""
    model, images = tiny_llava(), random_images(2)
    tokens = batch(model)
    whole, cache, parts = model(tokens, images=images), [None] * 2, []
    for part in (tokens[:, :cut], tokens[:, cut:]):
        shown = {"images": images} if (part == PICTURE).any() else {}
        parts.append(model(part, cache=cache, **shown))
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_generation_with_the_cache_is_generation_without_in_a_mixed_batch():
    model, images = tiny_llava(), random_images(2)
    # between two others, so that it is never said: it would be a place without a picture
    model.head.weight[PICTURE] = model.head.weight[8:10].mean(0)
    prompts = [text(model.places, 2, 3), text(0, 1, 1, seed=5), text(model.places, 0, 2, seed=6)]
    said = models.generate_batch(model, prompts, 6, images=images)
    for prompt, own, answer in zip(prompts, (images[:1], None, images[1:]), said):
        tokens = [*prompt]
        for _ in range(6):
            logits = model(torch.tensor([tokens]), images=own)
            tokens.append(logits[0, -1].argmax().item())
        assert answer == tokens[len(prompt) :]


def test_the_config_rebuilds_the_model():
    model = tiny_llava()
    again = LLaVA(**model.config)
    again.load_state_dict(model.state_dict())
    tokens, images = batch(model), random_images(2)
    assert torch.equal(again(tokens, images=images), model(tokens, images=images))
    assert not any("tower.head" in name or "tower.norm." in name for name in model.state_dict())


# -------------------------------------------------------------------------------------- links


def test_the_links_are_those_of_the_method():
    model = tiny_llava()
    links = {link.layer: link for link in model.links(tower=True)}
    tower = model.tower.links()
    assert [links[f"tower.{own.layer}"].anterior for own in tower] == [
        own.anterior and f"tower.{own.anterior}" for own in tower
    ]
    index = [*range(8)] * 4
    assert links["projector.fc1"] == Link("projector.fc1", "tower.blocks.1.mlp.fc2", index)
    assert links["projector.fc2"] == Link("projector.fc2", "projector.fc1")
    for name in "qkv":
        assert links[f"blocks.0.attn.{name}_proj"].anterior == "projector.fc2"
    language = models.LLaMA(**TEXT).links()
    rest = [own for own in language if own.anterior is not None]
    assert [links[own.layer] for own in rest] == rest
    unpooled = tiny_llava(pool=1).links(tower=True)
    assert Link("projector.fc1", "tower.blocks.1.mlp.fc2") in unpooled


def test_parts_that_are_left_out_leave_their_readers_without_an_anterior():
    model = tiny_llava()
    assert model.links(projector=False) == models.LLaMA(**TEXT).links()
    assert model.links()[0] == Link("projector.fc1")
    layers = {link.layer for link in model.links(tower=True, projector=False)}
    assert not any(name.startswith("projector") for name in layers)


def test_every_layer_but_the_head_is_linked():
    model = tiny_llava()
    kinds = (nn.Linear, nn.Conv2d)
    layers = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    assert {link.layer for link in model.links(tower=True)} == layers - {"head"}


def test_these_scales_are_propagated_nowhere():
    model = tiny_llava()
    unread = propagated_nowhere(model, model.links(tower=True))
    assert not any(name.startswith("projector") for name in unread)
    once = propagated_nowhere(model, model.links(tower=True, projector=False))
    assert once["tower.blocks.1.mlp.fc2"] == [*range(8)]
    assert once.keys() - unread.keys() == {"tower.blocks.1.mlp.fc2"}


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("parts", [dict(), dict(tower=True), dict(tower=True, projector=False)])
def test_links_attach_and_merge_exactly(pool, parts):
    model = tiny_llava(pool).double()
    base, tokens, images = copy.deepcopy(model), batch(model), random_images(2).double()
    san.attach(model, model.links(**parts), shift=True)
    with torch.no_grad():
        assert torch.equal(base(tokens, images=images), model(tokens, images=images))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "beta")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        adapted = model(tokens, images=images)
        assert (adapted - base(tokens, images=images)).abs().max() > 0.1
        san.merge(model)
        assert (model(tokens, images=images) - adapted).abs().max() < 1e-10
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("pool", [1, 2])
def test_the_links_are_found_by_asking_the_model(pool):
    model = tiny_llava(pool)
    example = dict(tokens=batch(model, count=1, before=3, after=12), images=random_images(1))
    found = {p.link.layer: p for p in propose(model, example)}
    for layer, anterior, index in model.links(tower=True):
        link = found[layer].link
        assert link.anterior == anterior, layer
        assert (link.index and [*link.index]) == (index and [*index]), layer
