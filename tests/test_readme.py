"""README and docs: their commands and examples run, their claims and figures hold."""

import contextlib
import copy
import io
import re
import shlex
import textwrap
from pathlib import Path
from string import Template

import faults
import pytest
import torch
from torch import nn

import models
import san
import train_lm
import train_vision
from lab import bench, pictures, tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NARROW = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*NARROW, *sorted((ROOT / "results").glob("*.md")), ROOT / "weights" / "README.md"]
SCRIPTS = {"train_vision.py": train_vision, "train_lm.py": train_lm}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def section(title: str) -> str:
    return re.search(rf"^## {title}$(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def rows(text: str) -> list[dict[str, str]]:
    """Every row of every Markdown table, its cells by the table's header."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
        found += [dict(zip(lines[0], line)) for line in lines[2:]]
    return found


# ------------------------------------------------------------------------------------------ form


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", NARROW, ids=lambda page: page.name)
def test_no_line_is_wider_than_100_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []


@each_page
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(\s*([^)#\s]+)", page.read_text(encoding="utf-8"))
    own = [link for link in links if "://" not in link]
    assert [link for link in own if not (page.parent / link).exists()] == []


def test_the_section_of_two_commands_holds_what_ci_runs_and_says_what_for():
    lines = section("Two commands").splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("pip install")]
    install = "pip install -r requirements.txt && python "
    assert [lines[i] for i in at] == [f"{install}train_vision.py", f"{install}-m pytest"]
    assert all(lines[i - 1].startswith("# ") for i in at)


# -------------------------------------------------------------------------------------- commands


def commands(text: str, script: str) -> list[list[str]]:
    """The words after every `python <script>` of a text, with the values of a shell's variables."""
    text = text.replace("\\\n", " ")
    values = dict(re.findall(r'^(\w+)="([^"]*)"', text, re.MULTILINE))
    values |= dict(re.findall(r"\bfor (\w+) in (\S+)", text))
    found = re.findall(rf"python (?:-m )?{re.escape(script)}\b([^;`\n]*)", text)
    return [shlex.split(Template(line).safe_substitute(values), comments=True) for line in found]


def test_commands_are_found_with_their_variables_and_a_wrong_one_is_refused():
    text = 'flags="--seed 1"\nfor m in a b; do python train_lm.py $flags \\\n  --out $m; done  # c'
    assert commands(text, "train_lm.py") == [["--seed", "1", "--out", "a"]]
    (words,) = commands("`python train_vision.py --wiring exact`", "train_vision.py")
    with pytest.raises(SystemExit):
        train_vision.arguments(words)


@each_page
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_of_a_page_is_one_that_the_script_takes(page, script):
    for words in commands(page.read_text(encoding="utf-8"), script):
        SCRIPTS[script].arguments(words)  # a wrong flag or choice raises SystemExit


@pytest.mark.parametrize("page", NARROW, ids=lambda page: page.name)
def test_a_run_that_a_page_reads_again_is_one_that_its_commands_make(page):
    text = page.read_text(encoding="utf-8")
    given = [s.arguments(words) for name, s in SCRIPTS.items() for words in commands(text, name)]
    read = {run for args in given for run in [args.evaluate, *(getattr(args, "plot", 0) or ())]}
    assert read - {None, "runs/…"} <= {args.out for args in given}


def test_cifar100_has_the_defaults_that_the_readme_names():
    said = section("CIFAR-100 on one GPU, a real LLaMA")
    words, small = commands(said, "train_vision.py")
    assert (ROOT / "weights" / f"{train_vision.arguments(small).model[0]}.pt").is_file()
    args = train_vision.arguments(words)
    assert (args.method, args.model, args.weights) == ("san", ["vit_b16"], None)  # imagenet1k
    assert f"for {args.epochs} epochs" in said.replace("\n", " ")
    assert f"`{args.data_dir}/`" in said and "`runs/`" in said
    assert train_lm.arguments(commands(said, "train_lm.py")[0]).weights == "smollm2"


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of every command, from its --help."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bench.py", "--help"])
        for name, ask in {
            "train_vision.py": lambda: train_vision.arguments(["--help"]),
            "train_lm.py": lambda: train_lm.arguments(["--help"]),
            "lab.bench": bench.main,
            "faults.py": faults.main,
        }.items():
            with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
                ask()
            found[name] = set(re.findall(r"--[a-z][a-z-]+", printed.getvalue()))
    return found


@each_page
def test_every_flag_that_a_page_names_exists(page, flags):
    text = page.read_text(encoding="utf-8")
    for words in commands(text, "lab.bench"):
        assert {word for word in words if word.startswith("--")} <= flags["lab.bench"]
    for named in re.findall(r"`(--[a-z][^`]*)`", text):
        takers = [n for n in flags if set(re.findall(r"--[a-z][a-z-]+", named)) <= flags[n]]
        assert takers, named
        if " " in named and takers[0] in SCRIPTS:  # with a value
            SCRIPTS[takers[0]].arguments(named.split())


# -------------------------------------------------------------------------------------- examples


def examples() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert [len(example.splitlines()) < 20 for example in found] == [True, True]
    return found


def test_the_first_example_trains_saves_and_merges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merge, x, outputs = san.merge, torch.randn(5, 8), []

    def merge_and_compare(model: nn.Module) -> None:
        for layer in san.summary(model)["layers"].values():
            assert layer["min"] < layer["max"]  # it was trained
        outputs.append(model(x))
        merge(model)
        outputs.append(model(x))

    monkeypatch.setattr(san, "merge", merge_and_compare)
    names = {}
    exec(compile(examples()[0], "README.md", "exec"), names)
    torch.testing.assert_close(*outputs)
    assert {type(module) for module in names["model"]} == {nn.Linear, nn.GELU, nn.LayerNorm}
    values = san.read("adapter.pt")["values"]
    assert {"fc1.gamma", "fc3.beta", "norm.weight", "head.bias"} <= values.keys()


@torch.no_grad()
def test_the_second_example_links_a_vit_of_timm_and_merges():
    pytest.importorskip("timm", reason="the example adapts its ViT")
    example = examples()[1]
    offline = example.replace("pretrained=True", "pretrained=False")
    assert offline != example
    names = {}
    exec(compile(offline, "README.md", "exec"), names)
    model, x = names["model"].eval(), torch.randn(1, 3, 224, 224)
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(matrices) == len(names["links"]) + 1  # the head
    base = model(x)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted = model(x)
    san.merge(model)
    torch.testing.assert_close(model(x), adapted, atol=1e-4, rtol=1e-4)
    assert (adapted - base).abs().max() > 0.1


def test_the_docs_example_builds_a_saved_model():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "runs/…/merged.pt" in example
    example, names = example.replace("runs/…/merged.pt", f"{ROOT}/weights/vit_micro.pt"), {}
    exec(textwrap.dedent(example), names)
    state, saved = names["model"].state_dict(), names["run"]["state_dict"]
    assert all(torch.equal(state[key], saved[key].float()) for key in saved)


# ---------------------------------------------------------------------------------------- claims


def test_the_five_links_of_the_table_are_those_of_the_first_block():
    links = models.build("vit_micro", 2).links()
    title = "The links of a ViT's first block, of others, and what propagation adds"
    table = [
        [cell.strip("`").partition("`")[0] for cell in r.values()] for r in rows(section(title))
    ]
    assert [row[:2] for row in table[:5]] == [
        [(name or "none").removeprefix("blocks.0.") for name in link[:2]] for link in links[:5]
    ]
    assert links[5] == san.Link("blocks.1.attn.qkv", "blocks.0.mlp.fc2")


BACKBONES = ["vit_micro", "swin_micro", "convnext_micro", "llama"]
# the norm that a layer reads, by the layer's name
NORM_OF = {
    r"attn\.(qkv|[qkv]_proj)$": "norm1",
    r"mlp\.(fc1|gate_proj|up_proj)$": "norm2",
    r"(pwconv1|reduction)$": "norm",
    r"^(downsample\.\d)\.1$": r"\1.0",
}


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        model = models.LLaMA(50, dim=16, depth=2, heads=4, kv_heads=2, hidden=24, context=32)
    else:
        model = models.build(name, 5)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_not_propagated_through_gelu_feature_scaling_can_reach(name):
    """SAN without the links through GELU, and feature scaling that takes over what γ' did."""
    model = backbone(name)
    links = [
        san.Link(link.layer) if link.layer.endswith(("fc2", "pwconv2")) else link
        for link in model.links()
    ]
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm | models.RMSNorm)]
    other = copy.deepcopy(model)
    san.attach(model, links, shift=True, trainable=norms)
    alone = [san.Link(link.layer) for link in links]  # nothing is propagated: feature scaling
    san.attach(other, alone, shift=True, trainable=norms)
    values = dict(other.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.rand_like(parameter))  # every γ stays positive
            values[key].copy_(parameter)
    x = torch.randint(50, (2, 9)) if name == "llama" else torch.randn(2, 3, 32, 32).double()
    assert not torch.allclose(other(x), model(x))

    scaled = set()
    for layer, anterior, index in links:
        if anterior is None:
            continue
        gamma = model.get_parameter(f"{anterior}.gamma")
        index = [*range(len(gamma))] if index is None else [*index]
        norm = [re.sub(a, b, layer) for a, b in NORM_OF.items() if re.search(a, layer)]
        if norm and norm[0] in scaled:  # by another layer, with the same anterior
            continue
        if norm:  # γ' on what the norm gives out
            scaled.add(norm[0])
            for parameter in other.get_submodule(norm[0]).parameters():
                parameter.mul_(gamma[index])
        elif layer.endswith("dwconv"):  # γ' on what it gives out, less its bias
            bias = values[f"{layer}.layer.bias"]
            values[f"{layer}.beta"].add_(values[f"{layer}.gamma"] * bias * (1 - gamma[index]))
            values[f"{layer}.gamma"].mul_(gamma[index])
        else:  # γ² in place of γ on the channels that the layer reads
            read = sorted(set(index))
            for key in {f"{anterior}.gamma", f"{anterior}.beta"} & values.keys():
                values[key][read] *= gamma[read]
    torch.testing.assert_close(other(x), model(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", BACKBONES)
def test_gamma_acts_once_where_no_layer_reads_it(name):
    model = backbone(name)
    width = {layer: len(model.get_parameter(f"{layer}.weight")) for layer, *_ in model.links()}
    unread = {layer: set(range(width[layer])) for layer in width}
    for _, anterior, index in model.links():
        if anterior:
            unread[anterior] -= set(range(width[anterior]) if index is None else index)
    once = {layer: channels for layer, channels in unread.items() if channels}
    last = [layer for layer in width if layer.endswith(("fc2", "pwconv2", "down_proj"))][-1]
    assert len(once.pop(last)) == width[last]
    for layer, channels in once.items():
        if layer.endswith("qkv"):
            assert channels == set(range(2 * width[layer] // 3))  # q and k
    kinds = {"llama": {"q_proj", "k_proj", "gate_proj"}, "convnext_micro": set()}
    assert {layer.rpartition(".")[2] for layer in once} == kinds.get(name, {"qkv"})


# --------------------------------------------------------------------------------------- figures


def results(name: str, column: str) -> dict[tuple[str, str], dict[str, str]]:
    """(model, method) → the row of results/<name>.md, of the first table with that column."""
    found = {}
    for row in rows((ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")):
        if {column, "method"} <= row.keys():
            found.setdefault((row.get("model", "llama_micro"), row["method"]), row)
    return found


def first(cell: str) -> float:
    return float(cell.strip("*").split()[0])


def test_the_table_of_results_is_that_of_the_results_files():
    table = rows(section("Results"))
    assert len(table) == 6
    for row in table:
        data, model = row.pop("data, model").split(", ")
        row = {method: cell for method, cell in row.items() if cell}  # those that were run
        for method, cell in row.items():
            page = "smollm2" if data == "commonsense" else data.replace("-", "_")
            value = results(page, "mean")[model, method.lower()]["mean"]
            assert cell.strip("*") == value.split(" ± ")[0]
        best = max(row, key=lambda method: first(row[method]))
        assert [method for method in row if "*" in row[method]] == [best]


@pytest.mark.parametrize("name", ["real", "smollm2", "scenes", "easy_vqa"])
def test_the_tables_of_a_page_are_those_of_its_lines(name):
    page = (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
    lines = tables.read_results(ROOT / "results" / name / "results.jsonl")
    assert all(table in page for table in tables.tables(lines).strip().split("\n\n"))
    tried = [line for line in lines if line["part"] == "search"]
    assert tables.tables(tried).strip() in page
    for further in (ROOT / "results" / name).glob("*/results.jsonl"):  # an ablation, blind runs
        own = tables.tables(tables.read_results(further)).strip().split("\n\n")
        assert all(table in page for table in own)


def test_what_is_said_below_the_table_follows_from_the_results_files():
    said = " ".join(section("Results").split())
    everything = {}
    for page in ("real", "smollm2", "scenes", "easy_vqa", "microworld"):
        everything |= {(page, *key): row for key, row in results(page, "mean").items()}
    for words, method in (("SAN trains {} to {} % of", "san"), ("LoRA {} to {} %", "lora")):
        trained = [first(r["trained"]) for k, r in everything.items() if k[2] == method]
        assert words.format(round(min(trained), 1), round(max(trained), 1)) in said
    names = {"SSF": "ssf", "full": "full", "HyperAdapt (γ' not shared)": "hyperadapt"}
    names |= {"LoRA": "lora"}
    compared = results("real", "verdict")
    for name, method in names.items():
        assert f"{name} {compared['convnext_mini', method]['difference to SAN']}" in said
    verdicts = {row["verdict"] for row in results("smollm2", "verdict").values()}
    assert verdicts == {"level", ""} and "(results/smollm2.md) all are level" in said
    for page, names, words in (
        (
            "scenes",
            {"full", "lora", "dora", "hyperadapt", "san+lora"},
            "full, LoRA, DoRA and Hyper",
        ),
        ("easy_vqa", {"full", "dora"}, "(results/easy_vqa.md) full and DoRA."),
    ):
        seen = {method: row["verdict"] for (_, method), row in results(page, "verdict").items()}
        assert {method for method, verdict in seen.items() if verdict == "ahead"} == names
        assert words in said


def test_the_docs_count_the_tasks_that_torchvision_has():
    text = " ".join((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split())
    for name, tasks in (("VTAB's", pictures.VTAB), ("FGVC's", pictures.FGVC)):
        there = sum(reason is None for _, reason in tasks.values())
        assert f"torchvision has {there} of {name} {len(tasks)} " in text
