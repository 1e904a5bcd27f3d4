"""lm-evaluation-harness with the model type `headpatch`: a local task, patched and untouched, against numbers computed here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
import yaml
from tiny_model import RECIPE, save_tiny_model

import headpatch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
# What the harness's own dependencies do to themselves is not about our calls.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROWS = [
    ("the film is good", "positive"), ("the film is bad", "negative"), ("nobody laughed", "negative"),
    ("everybody laughed", "positive"), ("good good good", "positive"), ("the capital is bad", "negative"),
]  # fmt: skip
CHOICES = ("negative", "positive")
TASK = "tiny_sentiment"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a recipe, a task and its data."""
    folder = tmp_path_factory.mktemp("harness")
    save_tiny_model(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    tasks = folder / "tasks"
    tasks.mkdir()
    data = tasks / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": CHOICES.index(v)}) + "\n" for t, v in ROWS))
    (tasks / f"{TASK}.yaml").write_text(
        yaml.safe_dump({
            "task": TASK, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "Review: {{text}}\nSentiment:",
            "doc_to_target": "label", "doc_to_choice": list(CHOICES),
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        })
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def harness(place, tmp_path_factory):
    """Run the task with the harness, in this process: its results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        import datasets
        import lm_eval
        from lm_eval.tasks import TaskManager

        from headpatch.adapters.huggingface import lm_eval as ours

        datasets.disable_progress_bars()
        ours.register()
        ours.register()  # a second call does nothing

        def run(**arguments):
            return lm_eval.simple_evaluate(
                model="headpatch", model_args={"pretrained": str(place / "model"), "dtype": "float32", **arguments},
                tasks=[TASK], task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
                device="cpu", batch_size=4, bootstrap_iters=0, log_samples=True, random_seed=0, verbosity="ERROR",
            )  # fmt: skip

        yield run


def by_hand(place, recipe=None):
    """Log-likelihood of every choice after every prompt: one forward each, no batch, no cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    if recipe:
        headpatch.apply(model, str(recipe))
    found = []
    for text, _ in ROWS:
        prompt = f"Review: {text}\nSentiment:"
        row = []
        for choice in CHOICES:
            start = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
            ids = tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            row.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        found.append(row)
    return found


def harness_logs(results):
    samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [[float(pair[0][0]) for pair in sample["resps"]] for sample in samples]


@pytest.mark.parametrize("patched", [False, True])
def test_a_local_task_gives_the_model_s_own_numbers(harness, place, patched):
    recipe = place / "recipe.yaml" if patched else None
    results = harness(**({"recipe": str(recipe)} if patched else {}))
    wanted = by_hand(place, recipe)
    for row, ours in zip(harness_logs(results), wanted, strict=True):
        assert row == pytest.approx(ours, abs=2e-4)
    right = [
        max(range(2), key=row.__getitem__) == CHOICES.index(label)
        for row, (_, label) in zip(wanted, ROWS, strict=True)
    ]
    assert results["results"][TASK]["acc,none"] == pytest.approx(sum(right) / len(ROWS))
    assert ("headpatch_recipe" in results["config"]) == patched
    if patched:
        assert results["config"]["headpatch_digest"] == headpatch.load_recipe(str(recipe)).digest


def test_the_recipe_makes_a_difference(place):
    plain, patched = by_hand(place), by_hand(place, place / "recipe.yaml")
    assert max(math.fabs(a - b) for p, q in zip(plain, patched, strict=True) for a, b in zip(p, q, strict=True)) > 0.1


def test_a_wrong_recipe_is_refused(harness):
    with pytest.raises(headpatch.RecipeError, match="no shipped recipe"):
        harness(recipe="no/such")
    with pytest.raises(headpatch.RecipeError, match="the model has 3"):
        harness(recipe="smollm2-135m-instruct/follow-context")


def test_the_entry_point_names_the_model_type():
    """Releases of the harness after 0.4.13 discover it through this."""
    from lm_eval.api.model import LM

    (entry,) = (e for e in entry_points(group="lm_eval.models") if e.name == "headpatch")
    assert issubclass(entry.load(), LM)


@pytest.mark.slow
def test_the_command_hands_over(place, tmp_path):
    """`headpatch lm-eval` with the harness's own arguments, in a process of its own."""
    arguments = [
        "--model", "headpatch", "--model_args", f"pretrained={place / 'model'},dtype=float32,recipe={place / 'recipe.yaml'}",
        "--tasks", TASK, "--include_path", str(place / "tasks"), "--device", "cpu", "--batch_size", "4",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "headpatch", "lm-eval", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert TASK in run.stdout
    (result,) = (tmp_path / "out").rglob("results_*.json")
    wanted = by_hand(place, place / "recipe.yaml")
    right = [
        max(range(2), key=row.__getitem__) == CHOICES.index(label)
        for row, (_, label) in zip(wanted, ROWS, strict=True)
    ]
    found = json.loads(result.read_text())
    assert found["results"][TASK]["acc,none"] == pytest.approx(sum(right) / len(ROWS))
    assert found["config"]["headpatch_recipe"] == "tiny"
