"""The reasoning experiment in small: what is taught is true and in no test, answers are scored as they should be, and
the statistics are those of textbooks."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from task_solvers import SOLVERS, animal_facts, kin_facts, singular

from aquila2_tut import Aquila2Config, AutoLoader
from aquila2_tut.data import encode_conversation, extract_answer
from aquila2_tut.evaluate import EvaluateError, leak, measured, reasoning
from aquila2_tut.evaluate.measured import by_steps, measured_leak, measured_reasoning, paired, score, scores
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.train import TrainError

ROOT = Path(__file__).resolve().parent.parent
SEEDS, LEAK_SEEDS = (1, 2, 3, 4, 5), (1, 2, 3)  # of the stored runs
PLAN = reasoning.Plan(questions={"babi15": 40, "babi16": 40, "kinship": 40}, asked=20)


@pytest.fixture(scope="module")
def chat():
    loader = AutoLoader(model_name=str(ROOT / "data" / "Aquila2-Nano-Chat"), device="cpu", torch_dtype=torch.float32)
    return loader.get_model().eval(), loader.get_tokenizer()


def facts_of(instance):
    read = kin_facts if instance.task == "kinship" else animal_facts
    return frozenset(read(instance.question, instance.language)[0])


# --- what is taught, and what is asked ---


def test_what_is_taught_is_what_a_solver_finds():
    """The answer, and what the chain of thought ends in; the steps of the chains are in test_data_tasks.py."""
    for instance in reasoning.training_set(PLAN, seed=1):
        answer = extract_answer(instance.conversation(cot=True)["conversations"][1]["value"], "en")
        assert answer == instance.answer == instance.conversation()["conversations"][1]["value"]
        found = singular(answer) if instance.task == "babi15" else answer
        assert SOLVERS[instance.task](instance.question, "en") == {found}


def test_no_run_is_taught_what_is_asked():
    """By the facts that a solver reads out of the texts, with the plan and the seeds of the stored runs."""
    plan = reasoning.Plan()
    asked = {facts_of(one) for some in reasoning.test_set(plan).values() for one in some}
    assert len(asked) == 300
    for seed in range(1, 6):
        taught = reasoning.training_set(plan, seed)
        assert len(taught) == sum(plan.questions.values())
        assert not asked & {facts_of(one) for one in taught}


def test_every_seed_has_questions_of_its_own_and_gives_them_again():
    first, second = (reasoning.training_set(PLAN, seed) for seed in (1, 2))
    assert first == reasoning.training_set(PLAN, 1)
    assert not {one.id for one in first} & {one.id for one in second}
    assert len({one.task for one in first[:10]}) > 1, "the tasks are not mixed"


def test_both_tuned_models_get_the_same_questions_in_the_same_order(chat, monkeypatch):
    model, tokenizer = chat
    given = []
    monkeypatch.setattr(reasoning, "train", lambda model, samples, *rest: given.append(samples) or [])
    instances, settings = reasoning.training_set(PLAN, 1)[:20], PLAN.settings(1, 20)
    for cot in (False, True):
        reasoning.tune(model, tokenizer, instances, settings, cot=cot)
    for instance, plain, thinking in zip(instances, *given, strict=True):
        for sample, told in ((plain, instance.answer), (thinking, instance.reasoning)):
            learned = tokenizer.decode([label for label in sample["labels"] if label != -100])
            assert instance.question in tokenizer.decode(sample["input_ids"])
            assert learned.strip().startswith(told)


def test_tuning_lowers_the_loss_and_is_taken_up_where_it_was_left(chat, tmp_path):
    """Half of a run, and then all of it in the same folder: the weights of a run that was not stopped."""
    tokenizer = chat[1]
    config = Aquila2Config(
        **{**Aquila2Config.preset("Aquila2-Nano").to_dict(), "hidden_size": 32, "head_dim": 8}
        | {"num_hidden_layers": 1, "intermediate_size": 32}
    )
    instances = reasoning.training_set(PLAN, 3)[:24]
    settings = replace(PLAN.settings(3, 24 * 2), batch_size=4, steps=12, save_every=6, precision="float32")

    class Killed(Exception):
        pass

    def kill(step):
        if step.step == 9:
            raise Killed

    def run(folder, on_step=lambda step: None):
        torch.manual_seed(0)
        model = Aquila2ForCausalLM(config)
        log = reasoning.tune(model, tokenizer, instances, settings, cot=True, folder=folder, on_step=on_step)
        return model.state_dict(), log

    whole, log = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill)
    again, log_again = run(tmp_path / "killed")
    assert log == log_again and log[-1].loss < log[0].loss
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# --- two ways to ask ---


def test_the_likelihood_of_an_answer_is_that_of_its_tokens(chat):
    """Against a forward pass of each whole conversation, without a cache, and the loss that transformers computes."""
    model, tokenizer = chat
    (instance, *_), *_ = reasoning.test_set(PLAN).values()
    answers = ["lions", "wolves", "a very long answer that is wrong"]
    expected = []
    for answer in answers:
        turns = [{"from": "human", "value": instance.question}, {"from": "gpt", "value": answer}]
        encoded = encode_conversation({"conversations": turns}, tokenizer, "aquila-v1")
        ids, labels = (torch.tensor([encoded[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            expected.append(-model(input_ids=ids, labels=labels).loss.item() * int((labels != -100).sum()))
    found = reasoning.log_likelihoods(model, tokenizer, instance.question, answers)
    assert found.tolist() == pytest.approx(expected, abs=2e-3)


def test_without_answers_there_is_nothing_to_choose(chat):
    with pytest.raises(EvaluateError, match="at least one"):
        reasoning.log_likelihoods(*chat, "What is Kiki afraid of?", [])


@pytest.mark.parametrize("told, right", [("answer", True), ("other", False)])
def test_the_likeliest_answer_is_the_one_that_counts(chat, monkeypatch, told, right):
    instance = reasoning.test_set(PLAN)["kinship"][0]
    possible = reasoning.possible_answers("kinship", "en")
    wanted = instance.answer if told == "answer" else next(one for one in possible if one != instance.answer)
    monkeypatch.setattr(
        reasoning, "log_likelihoods", lambda m, t, q, answers: torch.tensor([float(a == wanted) for a in answers])
    )
    assert reasoning.likeliest(*chat, [instance]) == [right]


def test_a_task_has_all_answers_that_are_asked_for():
    asked = reasoning.test_set(reasoning.Plan())
    for task, some in asked.items():
        assert {one.answer for one in some} <= set(reasoning.possible_answers(task, "en"))


def test_the_first_wrong_step_of_a_chain():
    """Every sentence of a chain replaced in turn, and chains that are cut off before their end."""
    for instance in reasoning.training_set(PLAN, 1)[:30]:
        said = instance.conversation(cot=True)["conversations"][1]["value"]
        steps = said.split(". ")
        assert reasoning.first_wrong_step(instance, said) == 0
        for number in range(len(steps) - 1):
            for wrong in ([*steps[:number], "Kiki is a duck", *steps[number + 1 :]], [*steps[:number], ""]):
                assert reasoning.first_wrong_step(instance, ". ".join(wrong)) == number + 1
        assert reasoning.first_wrong_step(instance, instance.answer) == 1


# --- what can be said ---


def marks(*rows):
    return {"task": np.array(rows)}


def test_the_score_weighs_tasks_alike():
    found = score({"a": np.array([[1, 1, 1, 0]]), "b": np.array([[0, 0], [0, 1]])}, rounds=50)
    assert found.value == pytest.approx((0.75 + 0.25) / 2)
    assert found.low <= found.value <= found.high


def test_an_interval_over_questions_alone_is_that_of_a_share():
    """One seed, 400 questions: the bootstrap comes close to the plain interval of a binomial share."""
    found = score(marks([1] * 120 + [0] * 280))
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.008)


def test_an_interval_has_the_seeds_in_it_too():
    """Runs that have everything right or nothing: of questions there is nothing to fear, of seeds there is."""
    alike, unlike = score(marks([1] * 200, [1] * 200)), score(marks([1] * 200, [0] * 200, [1] * 200, [0] * 200))
    assert (alike.low, alike.high) == (1, 1)
    assert (unlike.low, unlike.high) == (0, 1)


def test_the_paired_test_is_the_sign_test_where_all_differences_are_one():
    first, second = marks([0] * 9 + [1] * 40), marks([1] * 8 + [0] + [1] * 40)
    second["task"][0, 8], first["task"][0, 8] = 0, 1
    found = paired(first, second)
    assert found.p == pytest.approx(2 * (1 + 9) / 2**9, abs=0.01)
    assert found.difference.value == pytest.approx(7 / 49)
    assert (found.better, found.seeds) == (1, 1)


def test_the_paired_test_by_all_throws_of_the_coin():
    """Differences of several sizes, of two seeds: against the enumeration of all signs."""
    first, second = marks([0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]), marks([1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 0])
    each = second["task"].mean(0) - first["task"].mean(0)
    sums = [abs(np.dot(signs, each)) for signs in product((-1, 1), repeat=6)]
    exact = np.mean(np.array(sums) >= abs(each.sum()) - 1e-9)
    assert paired(first, second, rounds=10).p == pytest.approx(exact, abs=0.012)


def test_the_same_model_twice_is_no_difference():
    rows = marks([0, 1, 1, 0, 1], [1, 1, 0, 0, 1])
    found = paired(rows, rows, rounds=50)
    assert found.difference == (0, 0, 0)
    assert (found.p, found.better) == (1, 0)


def test_other_questions_are_not_compared():
    with pytest.raises(EvaluateError, match="same questions"):
        paired(marks([0, 1]), marks([0, 1, 1]))


# --- what is stored ---


def test_what_is_stored_was_done_by_the_plans_of_today():
    found = measured_reasoning()
    assert found.plan == json.loads(json.dumps(asdict(reasoning.Plan())))
    assert measured_leak().plan == json.loads(json.dumps(asdict(leak.LeakPlan())))
    assert found.seeds == SEEDS
    for variant, seeds in (("chat", 1), ("think", 1), ("sft", len(SEEDS)), ("cot", len(SEEDS))):
        for way in reasoning.WAYS:
            rows = found.marks(variant, way)
            assert {task: table.shape for task, table in rows.items()} == dict.fromkeys(reasoning.TASKS, (seeds, 100))
            assert all(set(np.unique(table)) <= {0, 1} for table in rows.values())


def test_what_was_not_measured():
    with pytest.raises(EvaluateError, match="nothing was measured of 'cot' by 'guessing'"):
        measured_reasoning().marks("cot", "guessing")


def test_the_chat_model_still_answers_as_stored(chat):
    """Thirty questions, both ways; another processor may round a tie to the other side."""
    asked = {task: some[:10] for task, some in reasoning.test_set(reasoning.Plan()).items()}
    ask = {
        "generation": lambda some: reasoning.right(some, reasoning.written(*chat, some, cot=False)),
        "likelihood": lambda some: reasoning.likeliest(*chat, some),
    }
    for way, answer in ask.items():
        stored = measured_reasoning().marks("chat", way)
        same = sum(int((stored[task][0, :10] == answer(some)).sum()) for task, some in asked.items())
        assert same >= 28


def test_a_chain_without_a_fault_ends_in_the_answer_more_often():
    found = measured_reasoning()
    for variant in reasoning.THINKING:
        for task, wrong in found.wrong_steps(variant).items():
            assert wrong.shape[1] == 100 and wrong.max() <= {"babi15": 2, "babi16": 3, "kinship": 4}[task]
            rows = found.marks(variant)[task][-len(wrong) :]
            assert rows[wrong == 0].mean() > rows[wrong > 0].mean() + 0.15
    with pytest.raises(EvaluateError, match="no chain of thought of 'sft'"):
        found.wrong_steps("sft")


def test_scores_are_of_the_stored_marks():
    """The values by plain counting; a guess among four species is right about one time in four."""
    table = scores(measured_reasoning())
    assert list(table["generation"]) == [*reasoning.TASKS, "mean"]
    runs = [run["generation"] for run in measured_reasoning().runs if run["variant"] == "cot"]
    shares = {task: sum(run[task].count("1") for run in runs) / len(runs) / 100 for task in reasoning.TASKS}
    for task, share in shares.items():
        assert table["generation"][task]["cot"].value == pytest.approx(share)
    assert table["generation"]["mean"]["cot"].value == pytest.approx(sum(shares.values()) / 3)
    assert 0.15 < table["generation"]["babi15"]["guess"].value < 0.4


def test_steps_are_the_relatives_in_the_story():
    """Counted in the questions: a story of n steps names n + 1 people in n sentences."""
    found = measured_reasoning()
    asked = reasoning.test_set(reasoning.Plan())["kinship"]
    right = found.marks("chat")["kinship"][0]
    table = by_steps(found)
    assert list(table) == [2, 3, 4]
    for count, row in table.items():
        chosen = [number for number, one in enumerate(asked) if len(kin_facts(one.question, "en")[0]) == count]
        assert row["chat"].value == pytest.approx(right[chosen].mean())


# --- the leak ---


@pytest.mark.parametrize("seed", LEAK_SEEDS)
def test_the_leak_is_found_and_nothing_else(seed):
    """Counted by the texts themselves; and an n-gram in common is no proof, which is what the other looks are for."""
    plan = leak.LeakPlan()
    out, fresh = leak.leaked_test(plan, seed), leak.fresh_test(plan, seed)
    for with_it in (True, False):
        training = leak.training_data(plan, seed, leak=with_it)
        texts = {one.question for one in training}
        assert len(training) == plan.clean + plan.leaked
        assert sum(one.question in texts for one in out) == (plan.leaked if with_it else 0)
        assert not any(one.question in texts for one in fresh)
        assert not {one.reasoning for one in fresh} & {one.reasoning for one in training}
        found = leak.found_in(out, training)
        assert found["every n-gram"] == found["near-duplicate"] == (plan.leaked if with_it else 0)
        assert leak.found_in(fresh, training)["near-duplicate"] == 0
        of = (seed, "leak" if with_it else "clean")
        (stored,) = (run for run in measured_leak().runs if (run["seed"], run["variant"]) == of)
        assert stored["found"]["leaked"] == found
    assert found["an n-gram"] > plan.leaked / 4, "a clean set would be accused by single n-grams"


def test_a_leak_lifts_the_score_of_its_own_test_alone():
    found = measured_leak()
    shares = {(v, test): rows.mean() for v in ("clean", "leak") for test, rows in found.marks(v).items()}
    assert found.marks("leak")["leaked"].shape == (len(LEAK_SEEDS), 80)
    assert shares["leak", "leaked"] > shares["clean", "leaked"] + 0.2
    assert abs(shares["leak", "fresh"] - shares["clean", "fresh"]) < 0.05


# --- the command ---


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("reasoning_command", ROOT / "benchmarks" / "reasoning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_that_broke_is_done_again_and_one_that_is_there_is_not(command, tmp_path):
    calls = []

    def run(variant, seed, folder):
        calls.append((variant, seed))
        folder.mkdir(exist_ok=True)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"variant": variant, "seed": seed}

    with pytest.raises(KeyboardInterrupt):
        command.done(tmp_path, "leak", "clean", 1, run)
    assert (tmp_path / "leak-clean-1").is_dir(), "its checkpoints are needed"
    for _ in range(2):
        assert command.done(tmp_path, "leak", "clean", 1, run) == {"variant": "clean", "seed": 1}
    assert len(calls) == 2 and not (tmp_path / "leak-clean-1").exists()


def test_runs_of_two_plans_are_not_mixed(command, tmp_path, monkeypatch):
    command.claim(tmp_path / "runs")
    command.claim(tmp_path / "runs")
    monkeypatch.setattr(command, "plans", lambda: {"reasoning": {"asked": 7}})
    with pytest.raises(TrainError, match="runs holds a run with reasoning="):
        command.claim(tmp_path / "runs")


def test_what_is_collected_is_what_is_read(command, monkeypatch):
    """The file that the command writes, through the functions that read it; a seed that is half done is left out."""
    way = {"generation": {"babi15": "01"}, "likelihood": {"babi15": "11"}}
    runs = [{"variant": v, "seed": s, **way} for v, s in (("chat", 0), ("sft", 1), ("cot", 1), ("sft", 2))]
    found = [("reasoning", run) for run in runs]
    found.append(("leak", {"variant": "leak", "seed": 1, "right": {"leaked": "11", "fresh": "00"}}))
    monkeypatch.setattr(measured, "_stored", lambda: json.loads(json.dumps(command.collected(found, 1))))
    assert measured_reasoning().seeds == (1,)
    assert measured_reasoning().marks("sft")["babi15"].tolist() == [[0, 1]]
    assert measured_leak().marks("leak")["leaked"].tolist() == [[1, 1]]
    assert measured_reasoning().conditions["command"].split()[1] == "benchmarks/reasoning.py"
    assert command.report(*found[-1]).endswith("leaked:  100%  fresh:    0%")
    assert sys.modules.get("reasoning_command") is None
