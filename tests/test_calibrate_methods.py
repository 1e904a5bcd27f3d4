"""Calibrations of methods that look at the whole prompt or at marked spans: exact in the sweep, and what was planted is found."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import planted
import pytest
import torch

import headpatch
from headpatch import cli
from headpatch.errors import EngineError, HeadpatchError
from headpatch.evaluate import evaluate_answers, evaluate_labels
from headpatch.find import act, pasta
from headpatch.find.calibration import Settings, calibrate, top
from headpatch.find.data import Row, Task
from headpatch.find.engine import Bench, open_bench
from headpatch.find.journal import Journal
from headpatch.find.measure import Goal, join, sample
from headpatch.find.search import Candidate, Effect, Evaluator, slopes
from headpatch.find.stats import Estimate
from headpatch.recipe import Recipe
from headpatch.sources import load_recipe

TASK = dataclasses.replace(planted.TASK, span_fields=("span",))
SINKS = {"threshold": 0.12, "min_queries": 2}
SETTINGS = Settings(
    (0.01,), screen=(60, 100), held_out=140, width=4, rounds=1, max_steps=4, random_draws=3, perplexity=1.0, indices=False,
    top=(1, 2, 4),
)  # fmt: skip


def recipe(method: str, heads: dict[str, float], **more: Any) -> Recipe:
    return Recipe.from_dict({"headpatch": 1, "patches": [{"method": method, "heads": heads, **more}]})


def marked(count: int, seed: int = 3) -> list[Row]:
    """Rows with two of their words marked."""
    return [
        Row({**r.fields, "span": " ".join(r.fields["text"].split()[1:3])}, r.place) for r in planted.rows(count, seed)
    ]


@pytest.mark.parametrize("labels", [[" negative", " positive"], [" film good", " film bad"]], ids=["first", "whole"])
@pytest.mark.parametrize(
    "edit",
    [
        recipe("act", {"0.1": 0.1, "1.2": 0.3, "1.3": 0.0}, **SINKS),
        recipe("act", {"1.*": 0.2}, threshold=1.5, threshold_per="prompt_length"),
        recipe("pasta", {"0.2": 0.05, "1.*": 0.2}),
        recipe("pasta", {"1.0": 0.0}, target_mass=0.4),
    ],
    ids=["act", "act-paper", "pasta", "spotlight"],
)
def test_batches_of_the_sweep_are_what_single_prompts_give(edit: Recipe, labels: list[str]) -> None:
    """Rows of different lengths share a batch, and answers may follow the prompt; neither may count as prompt."""
    model, rows = planted.model(), marked(9)
    bench = open_bench(model, planted.tokenizer(), max_tokens=64)
    prompts, spans = TASK.prompts(rows), TASK.spans(rows)
    questions = bench.questions(prompts, labels, spans=spans)
    found = dict(bench.run([None, edit], questions, bench.texts(planted.TEXTS[:1])))
    moved, tokenizer = 0.0, planted.tokenizer()
    for row, (prompt, pieces) in enumerate(zip(prompts, spans, strict=True)):
        for place, label in enumerate(labels):
            ids = tokenizer(prompt)["input_ids"]
            answer = tokenizer(prompt + label)["input_ids"][len(ids) :]
            told = {"spans": [pieces], "prompts": [prompt], "tokenizer": tokenizer}
            with headpatch.applied(model, edit) as handle, torch.no_grad(), handle.inputs(**told):
                # The prompt by itself, then the answer on its cache: nothing of the answer can be taken for the prompt.
                out = model(torch.tensor([ids]), use_cache=True)
                logp = [out.logits[0, -1].log_softmax(-1)]
                for token in answer[:-1]:
                    out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
                    logp.append(out.logits[0, -1].log_softmax(-1))
            total = sum(float(p[t]) for p, t in zip(logp, answer, strict=True))
            assert float(found[1].whole[row, place]) == pytest.approx(total, abs=2e-4)
            moved = max(moved, abs(total - float(found[0].whole[row, place])))
    assert moved > 0.003, "the edit must be seen to do something"


def test_texts_have_no_spans() -> None:
    bench = open_bench(planted.model(), planted.tokenizer())
    texts = bench.texts(planted.TEXTS)
    found = dict(bench.run([None, recipe("pasta", {"*.*": 0.01})], None, texts))
    torch.testing.assert_close(found[0].text, found[1].text, atol=1e-5, rtol=0)


def test_spans_that_nobody_gave_are_asked_for() -> None:
    bench = open_bench(planted.model(), planted.tokenizer())
    questions = bench.questions(planted.TASK.prompts(planted.rows(3)), [" negative", " positive"])
    with pytest.raises(EngineError, match="spans"):
        list(bench.run([recipe("pasta", {"0.0": 0.1})], questions))


def said(method: Recipe, rows: list[Row], task: Task = TASK) -> list[Row]:
    """The rows, labelled as the model answers under a secret recipe."""
    bench = open_bench(planted.model(), planted.tokenizer())
    asked = bench.questions(task.prompts(rows), list(task.labels.values()), spans=task.spans(rows))
    yes = next(iter(bench.run([method], asked)))[1].whole.argmax(1).tolist()
    return [Row({**r.fields, "label": ("no", "yes")[y]}, r.place) for r, y in zip(rows, yes, strict=True)]


def test_pasta_heads_are_found() -> None:
    rows = said(recipe("pasta", {"0.3": 0.001, "1.1": 0.001}), marked(560))
    found = calibrate(
        pasta.Pasta(),
        planted.model(),
        planted.tokenizer(),
        rows[:300],
        rows[300:],
        TASK,
        SETTINGS,
        texts=planted.TEXTS,
    )
    assert found.recipe is not None, found.choice
    heads = found.recipe.to_dict()["patches"][0]["heads"]
    assert {"0.3", "1.1"} & heads.keys()
    assert found.report.difference.values["accuracy"].low > 0
    assert found.recipe.provenance["span_fields"] == ("span",)
    assert "0.3" in found.down_effective() or "1.1" in found.down_effective()
    assert found.up_effective() == []
    again = evaluate_labels(planted.model(), planted.tokenizer(), found.recipe, rows[300:], TASK)
    assert again.after.values["accuracy"].value == found.report.after.values["accuracy"].value


def test_act_heads_are_found_among_those_with_sinks() -> None:
    rows = said(recipe("act", {"1.0": 0.0, "1.2": 0.0}, **SINKS), planted.rows(560, 5), planted.TASK)
    subject = act.Act(params=tuple(sorted(SINKS.items())))
    settings = dataclasses.replace(SETTINGS, strengths=(0.0,))
    found = calibrate(
        subject,
        planted.model(),
        planted.tokenizer(),
        rows[:300],
        rows[300:],
        planted.TASK,
        settings,
        texts=planted.TEXTS,
    )
    assert found.recipe is not None, found.choice
    patch = found.recipe.to_dict()["patches"][0]
    assert patch["threshold"] == 0.12
    assert patch["min_queries"] == 2
    assert {"1.0", "1.2"} & patch["heads"].keys()


def test_heads_without_sinks_are_left_out() -> None:
    """By the segment's own rule: where no key is a sink, applying the method changes nothing, bit for bit."""
    model = planted.model()
    bench: Bench = open_bench(model, planted.tokenizer())
    asked = sample(bench, "rows", planted.labelled(12), planted.TASK)
    params = {"threshold": 0.25}
    found = act.sink_heads(bench, [asked], params)
    every = [f"{layer}.{h}" for layer in range(2) for h in range(4)]
    assert 0 < len(found) < len(every)
    outcomes = dict(bench.run([None, *(recipe("act", {h: 0.0}, **params) for h in every)], asked.questions))
    for i, head in enumerate(every):
        change = float((outcomes[i + 1].first - outcomes[0].first).abs().max())
        assert (change > 1e-4) == (head in found), head
    left = act.Act(params=(("threshold", 0.25),)).prune([Candidate("act", h, 0.0) for h in every], bench, [asked])
    assert {c.selector for c in left} == found.keys()
    nothing = act.Act(params=(("threshold", 0.999),))
    rows = planted.labelled(300)
    got = calibrate(
        nothing, planted.model(), planted.tokenizer(), rows[:250], rows[250:], planted.TASK,
        dataclasses.replace(SETTINGS, screen=(40,), held_out=40), texts=planted.TEXTS,
    )  # fmt: skip
    assert got.recipe is None
    assert "changes anything" in got.choice.why


def test_labels_in_random_order_give_nothing_or_say_so() -> None:
    rows = planted.shuffled(400)
    small = dataclasses.replace(SETTINGS, strengths=(0.0,), screen=(40, 80), held_out=100)
    subject = act.Act(params=tuple(sorted(SINKS.items())))

    def run(settings: Settings) -> Any:
        return calibrate(
            subject,
            planted.model(),
            planted.tokenizer(),
            rows[:250],
            rows[250:],
            planted.TASK,
            settings,
            texts=planted.TEXTS,
        )

    assert run(small).recipe is None
    shipped = run(dataclasses.replace(small, anyway=True))
    assert shipped.recipe is not None
    assert "not confirmed" in shipped.recipe.provenance["choice"]


def effect(selector: str, strength: float, gain: float) -> Effect:
    return Effect(
        Candidate("pasta", selector, strength), Estimate(gain, gain, gain, 9), None, Estimate(0, 0, 0, 9), 0.0, 1.0, 0
    )


def test_lists_of_the_best() -> None:
    effects = [effect("1.0", 0.1, 0.2), effect("1.0", 0.01, 0.3), effect("0.2", 0.1, 0.25), effect("1.1", 0.1, -0.1)]
    assert [str(c) for c in top(effects, 2)] == ["1.0=0.01", "0.2=0.1"]
    assert len(top(effects, 9)) == 2, "what gains nothing is in no list"
    other = [effect("0.2", 0.1, 0.1), effect("1.1", 0.1, 0.4)]
    assert pasta.common([effects, other], 2) == ["0.2"]
    with pytest.raises(HeadpatchError, match="no profiles"):
        pasta.common([], 3)


def test_refusals() -> None:
    rows = said(recipe("pasta", {"0.0": 0.5}), marked(300))

    def run(task: Task, settings: Settings = SETTINGS, given: list[Row] = rows) -> None:
        calibrate(pasta.Pasta(), planted.model(), planted.tokenizer(), given[:280], given[280:], task, settings)

    with pytest.raises(HeadpatchError, match="span field"):
        run(planted.TASK)
    with pytest.raises(HeadpatchError, match=r"alpha takes numbers of at least 0 and at most 1 other than 1.*\[2.0\]"):
        run(TASK, dataclasses.replace(SETTINGS, strengths=(2.0,)))
    elsewhere = [Row({**r.fields, "span": "nowhere"}, "file:7") for r in rows]
    with pytest.raises(HeadpatchError, match="file:7: 'span': 'nowhere' does not occur"):
        run(TASK, given=elsewhere)
    with pytest.raises(HeadpatchError, match="file:7: 'span' is null"):
        run(TASK, given=[Row({**r.fields, "span": None}, "file:7") for r in rows])
    with pytest.raises(HeadpatchError, match="top takes"):
        dataclasses.replace(SETTINGS, top=(0,))


def test_generated_answers_know_the_spans() -> None:
    rows = [Row({**r.fields, "answer": "word1"}, r.place) for r in marked(3)]
    edit = recipe("pasta", {"*.*": 0.0})
    got = evaluate_answers(
        planted.model(),
        planted.tokenizer(),
        edit,
        rows,
        "review {text} sentiment",
        max_new_tokens=3,
        span_fields=("span",),
    )
    model = planted.model()
    for row, generated in zip(rows, got.generated, strict=True):
        prompt = f"review {row.fields['text']} sentiment"
        ids = torch.tensor([planted.tokenizer()(prompt)["input_ids"]])
        told = {"spans": [[row.fields["span"]]], "prompts": [prompt], "tokenizer": planted.tokenizer()}
        with headpatch.applied(model, edit) as handle, handle.inputs(**told):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
            )
        assert planted.tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True) == generated.after


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`calibrate pasta`, then the two commands of its provenance."""
    rows = said(recipe("pasta", {"0.*": 0.001, "1.*": 0.001}, keep_first=True), marked(420))
    planted.model().save_pretrained(tmp_path / "tiny")
    planted.tokenizer().save_pretrained(tmp_path / "tiny")
    for name, part in (("train", rows[:260]), ("eval", rows[260:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(dict(r.fields)) + "\n" for r in part))
    monkeypatch.chdir(tmp_path)
    words = [
        "calibrate", "pasta", "--model", "tiny", "--train", "train.jsonl", "--eval", "eval.jsonl", "--template",
        "review {text} sentiment", "--labels", "no= negative, yes= positive", "--span-field", "span", "--effort", "quick",
        "--screen", "30,60", "--held-out", "100", "--top", "2,4", "--max-steps", "2", "--perplexity", "1000", "--keep-first",
        "--anyway", "-o", "out.yaml", "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "down-effective (help when they are steered towards the marked spans)" in out
    assert "up-effective" not in out
    assert "wrote out.yaml" in out, out
    first = load_recipe("out.yaml")
    assert first.to_dict()["patches"][0]["keep_first"] is True
    assert cli.main([*first.provenance["verify"].split()[1:], "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert round(100 * measured["patched"]["accuracy"]["value"], 2) == first.provenance["patched"]["accuracy"]
    again = shlex.split(first.provenance["command"])[1:]
    for word in ("--span-field", "--top", "--keep-first", "--anyway"):
        assert word in again
    (tmp_path / "out.yaml.work").unlink()
    assert cli.main(again) == 0
    assert load_recipe("out.yaml").digest == first.digest
    capsys.readouterr()
    assert cli.main([*words[:-4], "-o", "x.yaml", "--span-field", "nothing"]) == 2
    assert re.search(r"train.jsonl:\d+: 'nothing' is null", capsys.readouterr().err)


@pytest.mark.parametrize("method", ["act", "pasta", "zerotuning"])
def test_slopes_are_derivatives_of_the_metric(method: str) -> None:
    """By finite differences of what the search maximises, over batches of several lengths."""
    model = planted.model().double()
    rows = said(recipe("head_scaling", {"0.1": 0.0}), marked(40))
    bench = open_bench(model, planted.tokenizer(), max_tokens=128)
    samples = [sample(bench, "a", rows[:15], TASK), sample(bench, "b", rows[15:], TASK)]
    goal = Goal(temperature=0.5)
    more = tuple(sorted(SINKS.items())) if method == "act" else ()
    heads = ["0.0", "0.3", "1.1", "1.2"]
    evaluator = Evaluator(bench, (), Journal(None, {}))
    found = slopes(evaluator, Candidate(method, "0.0", 1.0, more), heads, samples, goal)
    assert slopes(evaluator, Candidate(method, "0.0", 1.0, more), heads, samples, goal) == found, "kept in the journal"
    gold = torch.cat([s.gold for s in samples])
    step, tolerance = 0.001, 0.03 * max(map(abs, found.values()))
    for head in heads:
        ends = [
            join(
                [
                    next(iter(bench.run([recipe(method, {head: 1 + sign * step}, **dict(more))], s.questions)))[1]
                    for s in samples
                ]
            )
            for sign in ((-1, 0) if method != "zerotuning" else (-1, 1))
        ]
        if method != "zerotuning":  # strengths end at 1; the identity is no edit
            ends[1] = join([next(iter(bench.run([None], s.questions)))[1] for s in samples])
        means = [float(goal.agreement(o, gold).mean()) for o in ends]
        slope = (means[1] - means[0]) / (step if method != "zerotuning" else 2 * step)
        assert found[head] == pytest.approx(slope, abs=tolerance), head
    assert max(map(abs, found.values())) > 1e-4
    assert not headpatch.handles(model)


def test_slopes_find_the_planted_heads_with_few_measurements() -> None:
    rows = said(recipe("pasta", {"0.3": 0.001, "1.1": 0.001}), marked(560))
    settings = dataclasses.replace(SETTINGS, slopes=0.5)
    notes: list[str] = []
    found = calibrate(
        pasta.Pasta(), planted.model(), planted.tokenizer(), rows[:300], rows[300:], TASK, settings, texts=planted.TEXTS,
        say=notes.append,
    )  # fmt: skip
    assert "4 of 8 single edits are measured, by the slopes of the metric" in notes
    assert found.recipe is not None
    assert {"0.3", "1.1"} & found.recipe.to_dict()["patches"][0]["heads"].keys()
    with pytest.raises(HeadpatchError, match="slopes is a share"):
        dataclasses.replace(SETTINGS, slopes=0.0)
