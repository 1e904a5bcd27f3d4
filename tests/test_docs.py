"""The documentation says what is so: tables are fresh, examples run, messages are the ones that come."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

import headpatch
from headpatch import yamlio
from headpatch.heads import ModelShape, PartShape
from headpatch.registry import get_method, method_names
from headpatch.schema import Envelope, ModelBlock

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SHAPE = ModelShape("llama", {"text": PartShape((9,) * 30, (3,) * 30, (64,) * 30)}, "text")


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate():
    return load_script(ROOT / "docs" / "generate.py")


def test_generated_tables_are_fresh(generate):
    for page in generate.PAGES:
        text = page.read_text(encoding="utf-8")
        assert generate.render(text) == text, f"{page.name} is out of date: run `make docs`"


def test_every_generated_table_is_shown_somewhere(generate):
    shown = {found[1] for page in PAGES for found in generate.MARKED.findall(page.read_text(encoding="utf-8"))}
    assert shown == {name for name in generate.TABLES if not name.startswith("parameters") or own(name.split()[1])}


def test_a_stale_table_would_be_seen(generate):
    text = "<!-- generated: recipes -->\nold\n<!-- end -->\n"
    assert generate.render(text) != text
    with pytest.raises(KeyError):
        generate.render(text.replace("recipes", "no such table"))


def own(name: str) -> bool:
    return get_method(name).__module__.startswith("headpatch.")


@pytest.mark.parametrize("name", [name for name in method_names() if own(name)])
def test_every_method_has_its_section(name):
    text = read("methods.md")
    assert f"\n## {name}\n" in text
    assert "arXiv" in text.split(f"\n## {name}\n")[1].split("\n## ")[0], "name the source"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name} links to {target}; there are {sorted(slugs)}"


def test_recipe_format_page_names_every_key():
    text = read("recipes.md")
    for key in (*Envelope.model_fields, *ModelBlock.model_fields, "method", "heads", "part", "file", "sha256"):
        assert re.search(rf"`[^`]*\b{key}\b[^`]*`", text), f"docs/recipes.md does not say what {key} is"


def test_the_example_of_the_format_page_is_a_recipe():
    (example,) = (
        b for b in re.findall(r"```yaml\n(.*?)```", read("recipes.md"), re.DOTALL) if b.startswith("headpatch")
    )
    recipe = headpatch.Recipe.from_dict(yamlio.loads(example))
    assert recipe.check(SHAPE).num_heads > 0
    assert yaml.safe_load(example)["model"].keys() == ModelBlock.model_fields.keys()


ERRORS = re.findall(r"```yaml\n(.*?)```\n```text\n(.*?)\n```", read("errors.md"), re.DOTALL)


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_documented_recipe_errors_are_what_comes(text, message):
    with pytest.raises(headpatch.RecipeError) as caught:
        headpatch.Recipe.from_dict(yamlio.loads(text, "recipe.yaml"), source="recipe.yaml").check(SHAPE)
    assert str(caught.value) == message
    assert caught.value.remedy


def messages() -> str:
    """Every string in the code that a message may be made of; what is filled in is `...`."""
    found = []
    for folder in ("headpatch", "adapters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                    found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_documented_messages_exist():
    rows = re.findall(
        r"^\| `(.+?)` \| (\w+) \| (.+) \|$", read("errors.md").split("## The other kinds")[1], re.MULTILINE
    )
    code = messages()
    assert len(rows) > 10
    for message, kind, remedy in rows:
        assert message in code, f"docs/errors.md: no message says {message!r}"
        assert issubclass(getattr(headpatch, kind), headpatch.HeadpatchError)
        assert remedy


def test_every_error_class_is_documented():
    text = read("errors.md")
    for name in headpatch.__all__:
        value = getattr(headpatch, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert f"`{name}`" in text or f"`headpatch.{name}`" in text


def test_the_method_of_the_add_a_method_page_works():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from headpatch import registry

    (code,) = re.findall(r"```python\n(.*?)```", read("add-a-method.md"), re.DOTALL)
    known = dict(registry._methods)
    module = sys.modules["add_a_method"] = types.ModuleType("add_a_method")  # dataclasses look their module up
    try:
        exec(compile(code, "docs/add-a-method.md", "exec"), vars(module))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model, ids = LlamaForCausalLM(config).eval(), torch.randint(32, (1, 8))
        with torch.no_grad():
            plain = model(ids).logits
            for soft in (False, True):
                patch = {"method": "clip", "heads": ["*.1"], "limit": 0.01, "soft": soft}
                with headpatch.applied(model, {"headpatch": 1, "patches": [patch]}):
                    assert not torch.equal(model(ids).logits, plain)
                assert torch.equal(model(ids).logits, plain)
    finally:
        registry._methods.clear()
        registry._methods.update(known)


def test_the_custom_method_example_checks_itself(capsys):
    from headpatch import registry

    known = dict(registry._methods)
    try:
        load_script(ROOT / "examples" / "custom_method.py").main()
    finally:
        registry._methods.clear()
        registry._methods.update(known)
    assert "leaves no trace" in capsys.readouterr().out
    assert "sink_cap" not in method_names()


@pytest.mark.parametrize("name", sorted(headpatch.list_recipes()))
def test_shipped_recipes_say_everything(name):
    recipe = headpatch.load_recipe(name)
    data = recipe.to_dict()
    required = {key for key in Envelope.model_fields if key != "tensors"}
    assert required <= data.keys()
    assert data["name"] == name
    assert data["model"].keys() == ModelBlock.model_fields.keys()
    assert {"metric", "headpatch", "date"} <= data["provenance"].keys()
    if data["provenance"].get("status") == "published, not verified here":
        assert {"source", "caution"} <= data["provenance"].keys()
        assert "not verified here" in data["description"]
        return
    assert {"data", "baseline", "patched", "seed", "command"} <= data["provenance"].keys()
    script = re.search(r"python (\S+\.py)", data["provenance"]["command"])
    assert script is None or (ROOT / script[1]).is_file()


def test_nothing_needs_what_users_do_not_have():
    """No path of a developer's machine, and no folder beside the checkout."""
    here = Path(__file__)
    for folder in ("headpatch", "adapters", "recipes", "examples", "docs", "tests", "benchmarks", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".yaml", ".cfg", ".toml", ""} and path.is_file() and path != here:
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"\.\./shared|/work/|/root/|/opt/wheels", text), path
