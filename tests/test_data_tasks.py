"""Generated tasks: solvers that see only the text find each answer and no other; training and test share nothing."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from random import Random

import pytest
import regex
from task_solvers import SOLVERS, animal_facts, kin_facts, singular, solve_booking, sum_facts

from aquila2_tut import assets, cli
from aquila2_tut.data import (
    TASKS,
    DataError,
    Instance,
    extract_answer,
    generate,
    is_correct,
    tasks_cli,
    tasks_facts,
    tasks_kinship,
)
from aquila2_tut.data.tasks import side
from aquila2_tut.data.tasks_pairs import bare
from aquila2_tut.data.tasks_words import WORDS, Person

MADE_UP = sorted(SOLVERS)
LANGUAGES = ["en", "zh"]
POEMS = [[f"第{poem}首第{line}句" for line in range(4)] for poem in range(200)]
PAIRS = [(f"Open file {number}", f"打开文件{number}") for number in range(400)]


def some(task, language, split, count, seed=0, material=None):
    return list(islice(generate(task, language, split, seed, material), count))


# --- the answers ---


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", MADE_UP)
def test_the_answer_follows_from_the_text_and_no_other_does(task, language):
    for instance in some(task, language, "train", 1500) + some(task, language, "test", 500):
        answer = singular(instance.answer) if (task, language) == ("babi15", "en") else instance.answer
        assert SOLVERS[task](instance.question, language) == {answer}, instance


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_chain_of_relatives(language):
    """Not only those that the dice choose: all rows of two to four steps that the generator knows."""
    chains = [chain for groups in tasks_kinship.CHAINS.values() for group in groups for chain in group]
    assert len(chains) == len(set(chains)) > 1500
    dice = Random(7)
    for chain in chains:
        females = [chain[0] == "丈夫", *(step in tasks_kinship.FEMALE_STEPS for step in chain)]
        people = [Person(female, number) for number, female in enumerate(females)]
        told = tasks_kinship.tell_family(tasks_kinship.Family(people, chain), language, dice)
        assert SOLVERS["kinship"](told.question, language) == {told.answer}, (chain, told)


def test_english_never_depends_on_what_only_chinese_says():
    answers = {}
    for chain in (chain for groups in tasks_kinship.CHAINS.values() for group in groups for chain in group):
        english = tuple(WORDS["kin"][step] for step in chain)
        answers.setdefault(english, set()).add(WORDS["kin"][tasks_kinship.known(chain)[-1]])
    assert all(len(found) == 1 for found in answers.values())


def test_a_relation_that_does_not_follow_is_refused():
    for chain in (("爸爸", "儿子"), ("妈妈", "丈夫"), ("哥哥", "弟弟"), ("伯伯", "弟弟"), ("儿子", "爸爸")):
        with pytest.raises(KeyError):
            tasks_kinship.known(chain)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", MADE_UP)
def test_each_step_of_the_reasoning_is_true(task, language):
    for instance in some(task, language, "train", 300):
        steps = re.findall(r"[^。.]+[。.]", instance.reasoning)
        assert 2 <= len(steps) <= 4
        check = {"arithmetic": check_sums, "kinship": check_kinship}.get(task, check_animals)
        check(instance, [step.strip() for step in steps])


def check_animals(instance, _):
    story, _ = animal_facts(instance.question, instance.language)
    facts, _ = animal_facts(instance.reasoning, instance.language)
    assert len(facts) >= 2
    assert facts <= story


def check_sums(instance, steps):
    first, second = (re.fullmatch(r"(\d+)([-+×])(\d+)=(\d+)[.。]", step.replace(" ", "")).groups() for step in steps)
    for a, sign, b, c in (first, second):
        assert int(c) == {"+": int(a) + int(b), "-": int(a) - int(b), "×": int(a) * int(b)}[sign]
    assert [number for _, number in sum_facts(instance.question, instance.language)] == [
        int(number) for number in (first[0], first[2], second[2])
    ]
    assert (second[0], second[3]) == (first[3], instance.answer)


def check_kinship(instance, steps):
    """Each "so X is Y's Z" is what the solver finds when it is asked about X and Y in the same story."""
    story, _ = kin_facts(instance.question, instance.language)
    english = instance.language == "en"
    told = (
        " ".join(re.findall(r"[A-Z][^.?]*\.", instance.question)) if english else instance.question.rpartition("。")[0]
    )
    for number, step in enumerate(steps):
        fact, so, conclusion = re.split("(，所以|, so )", step[:-1]) if number else (step[:-1], "", "")
        assert kin_facts(fact + ("." if english else "。"), instance.language)[0] <= story
        if so:
            x, y, term = re.fullmatch(
                r"(\w+) is (\w+)'s ([\w-]+)" if english else "(..)是(..)的(.+)", conclusion
            ).groups()
            asked = f"{told} Who is {x} to {y}?" if english else f"{told}。{x}是{y}的谁？"
            assert SOLVERS["kinship"](asked, instance.language) == {term}
    assert term == instance.answer


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_record_of_a_booking_says_what_the_request_says(language):
    instances = some("booking", language, "train", 1500) + some("booking", language, "test", 500)
    for instance in instances:
        assert solve_booking(instance.question, language) == {instance.answer}, instance
    answers = Counter(instance.answer for instance in instances)
    assert answers.most_common(1)[0][1] <= 2, "no answer can be guessed"


def test_no_booking_of_the_test_is_trained_on():
    sides: list[set] = [set(), set()]
    for side_, split in zip(sides, ("train", "test"), strict=True):
        side_.update(tuple(json.loads(i.answer).values()) for i in some("booking", "en", split, 5000))
    assert not sides[0] & sides[1]
    for english, chinese in zip(some("booking", "en", "test", 50), some("booking", "zh", "test", 50), strict=True):
        one, other = ([*json.loads(instance.answer).values()] for instance in (english, chinese))
        assert one[4] == other[4]
        assert ENGLISH[other[0]] == one[0]


def test_a_record_counts_as_json():
    instance = Instance("booking", "en", "?", '{"name": "Ben", "people": 4}', "", "id")
    assert is_correct(instance, ' {"people":4,\n"name":"Ben"} ')
    for wrong in ('{"name": "Ben", "people": "4"}', '{"name": "Ben"}', "name Ben people 4", "", "null"):
        assert not is_correct(instance, wrong)


# --- the split ---


def canonical(task, instance):
    """The facts of a text, in English words whatever its language."""
    if task == "arithmetic":
        return tuple(sum_facts(instance.question, instance.language))
    if task == "kinship":
        facts, _ = kin_facts(instance.question, instance.language)
    else:
        facts, _ = animal_facts(instance.question, instance.language)
    if instance.language == "zh":
        facts = {tuple(ENGLISH.get(word, word) for word in fact) for fact in facts}
    return frozenset(facts)


ENGLISH = {row[2]: row[0] for row in WORDS["species"]}
ENGLISH |= {chinese: english for name in ("pets", "colours", "men", "women") for english, chinese in WORDS[name]}
ENGLISH |= WORDS["kin"]


@pytest.mark.slow
@pytest.mark.parametrize("task", MADE_UP)
def test_training_and_test_share_nothing(task):
    """100,000 instances: other seeds, both languages; what is compared is read out of the texts."""
    sides, questions, count = {"train": set(), "test": set()}, set(), 0
    for split, plan in (("train", [("en", 0), ("en", 1), ("zh", 2)]), ("test", [("en", 0), ("zh", 3)])):
        for language, seed in plan:
            for instance in islice(generate(task, language, split, seed), 20_000):
                sides[split].add(canonical(task, instance))
                questions.add(instance.question)
                count += 1
    assert count == 100_000
    assert not sides["train"] & sides["test"]
    assert len(questions) > 0.97 * count
    if task != "arithmetic":  # there are not so many sums, only many tales of each
        assert len(sides["train"]) > 0.97 * 60_000
    assert len(sides["test"]) > 10_000


@pytest.mark.parametrize("task", MADE_UP)
def test_the_same_story_in_another_order_is_on_the_same_side(task, monkeypatch):
    """With few words the dice throw the same facts again and again, in other orders and with other questions."""
    for name, few in (("SPECIES", 6), ("PETS", 4 if task == "babi15" else 5), ("COLOURS", 2)):
        monkeypatch.setattr(tasks_facts, name, getattr(tasks_facts, name)[:few])
    for name in ("men", "women"):
        monkeypatch.setitem(WORDS, name, WORDS[name][:5])
    train, test = (
        [canonical(task, instance) for instance in some(task, "en", split, count)]
        for split, count in (("train", 20_000), ("test", 10_000))
    )
    assert len(train) - len(set(train)) > 50, "the words are not few enough for this test to see anything"
    assert not set(train) & set(test)


@pytest.mark.parametrize("task", MADE_UP)
def test_one_in_eight_is_for_the_test(task):
    made = TASKS[task]
    worlds = list(islice(made.worlds(Random(3), None), 8000))
    share = sum(side(made.key(world)) == "test" for world in worlds) / len(worlds)
    assert 0.11 < share < 0.14


@pytest.mark.parametrize("task", MADE_UP)
def test_both_languages_tell_the_same_worlds(task):
    for english, chinese in zip(some(task, "en", "test", 200), some(task, "zh", "test", 200), strict=True):
        assert canonical(task, english) == canonical(task, chinese)
        assert english.id != chinese.id


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_same_seed_gives_the_same(task):
    material = {"next-line": POEMS}.get(task, PAIRS if task.startswith("translate") else None)
    first = some(task, "zh", "train", 50, seed=5, material=material)
    assert first == some(task, "zh", "train", 50, seed=5, material=material)
    assert first != some(task, "zh", "train", 50, seed=6, material=material)
    assert len({instance.id for instance in first}) == 50


def test_the_same_on_another_day():
    """Sets are ordered by a hash that Python changes from run to run; instances must not be."""
    command = "from aquila2_tut.cli import main; main('data tasks --task kinship --split test -n 30'.split())"
    shown = {
        subprocess.run(
            [sys.executable, "-c", command], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(shown) == 1
    assert shown.pop().count(b"[kinship-en-") == 30


# --- variety and size ---


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task, most", [("babi15", 0.08), ("babi16", 0.15), ("kinship", 0.16), ("arithmetic", 0.04)])
def test_no_answer_is_a_good_guess(task, most, language):
    answers = Counter(instance.answer for instance in some(task, language, "train", 4000))
    assert answers.most_common(1)[0][1] / 4000 < most


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_place_in_the_story_does_not_give_the_answer_away(language):
    """The animal feared first in the story, and the last one, are the answer about as often as by chance, 2 in 7."""
    hits = Counter()
    for instance in some("babi15", language, "train", 2000):
        pattern = r"(?:of|fear) (\w+)\." if language == "en" else r"怕([^。？什]+)。"
        feared = re.findall(pattern, instance.question)
        hits["first"] += feared[0] == instance.answer
        hits["last"] += feared[-1] == instance.answer
    assert max(hits.values()) < 0.35 * 2000


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", MADE_UP)
def test_instances_are_short(task, language):
    """In pieces that any vocabulary has: words and marks in English, characters in Chinese."""
    for instance in some(task, language, "train", 2000):
        pieces = re.findall(r"\w+|[^\w\s]", instance.question) if language == "en" else instance.question
        assert len(pieces) <= (100 if language == "en" else 110), instance
        explained = instance.conversation(cot=True)["conversations"][1]["value"]
        pieces = re.findall(r"\w+|[^\w\s]", explained) if language == "en" else explained
        assert len(pieces) <= 100


def test_words_cannot_be_mistaken_for_each_other():
    for column in (0, 1):
        names = [row[column] for name in ("pets", "men", "women") for row in WORDS[name]]
        assert len(names) == len(set(names))
    words = [row[2] for row in WORDS["species"]] + [row[1] for row in WORDS["colours"]]
    assert len(words) == len(set(words))
    names = [row[1] for name in ("pets", "men", "women") for row in WORDS[name]]
    assert not [(one, other) for one in words for other in words + names if one != other and one in other]
    assert all(len(name) == 2 for name in names)
    rows = [row for kind in ("species", "colours", "things") for row in WORDS[kind]]
    assert all(regex.fullmatch(r"[a-z]+|\p{Han}+", word) for row in rows for word in row)


def test_synonyms_are_other_words_for_terms_that_are_used():
    assert not set(WORDS["synonyms"]) & set(WORDS["kin"])
    assert set(WORDS["synonyms"].values()) <= set(WORDS["kin"])


# --- conversations and judging ---


THINK = {"en": "Think step by step.", "zh": "请一步一步地想。"}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_an_instance_accepts_its_own_answer_and_no_other(task, language):
    material = {"next-line": POEMS}.get(task, PAIRS if task.startswith("translate") else None)
    instances = some(task, language, "train", 300, material=material)
    for instance, other in zip(instances, instances[1:] + instances[:1], strict=True):
        for cot in (False, True):
            sample = instance.conversation(cot)
            assert sorted(sample) == ["conversations", "id"]
            human, gpt = sample["conversations"]
            assert human["from"] == "human" and human["value"].startswith(instance.question)
            asked = human["value"].removeprefix(instance.question).strip()
            assert asked == (THINK[language] if cot and instance.reasoning else "")
            assert gpt["from"] == "gpt"
            assert is_correct(instance, gpt["value"])
            assert is_correct(instance, f"  {gpt['value']}\n")
            wrong = other.conversation(cot)["conversations"][1]["value"]
            assert is_correct(instance, wrong) == (instance.answer == other.answer)
        assert not is_correct(instance, "")
        assert (len(instance.conversation(True)["conversations"][1]["value"]) > len(instance.answer)) == bool(
            instance.reasoning
        )


@pytest.mark.parametrize(
    "language, text, answer",
    [
        ("en", "Gus is a swan. So the answer is white.", "white"),
        ("en", "So the answer is white", "white"),
        ("en", "The answer is: white.\nWhat else?", "white"),
        ("en", "So the answer is white. Next question: ...", "white"),
        ("en", "So the answer is 3. No: so the answer is 4.", "4"),
        ("en", "  white  ", "white"),
        ("en", "", ""),
        ("zh", "团团是天鹅。所以答案是白色。", "白色"),
        ("zh", "答案：白色", "白色"),
        ("zh", "所以答案是白色。下一题……", "白色"),
        ("zh", "白色", "白色"),
    ],
)
def test_extract_answer(language, text, answer):
    assert extract_answer(text, language) == answer


@pytest.mark.parametrize(
    "task, language, answer, output, right",
    [
        ("babi15", "en", "wolves", "Wolves.", True),
        ("babi15", "en", "wolves", "a wolf", True),
        ("babi15", "en", "wolves", "the wolves", True),
        ("babi15", "en", "wolves", "wolves and cats", False),
        ("babi15", "en", "wolves", "cats", False),
        ("babi16", "zh", "白色", "白色的。", True),
        ("babi16", "zh", "白色", "黑色", False),
        ("kinship", "zh", "爷爷", "祖父", True),
        ("kinship", "zh", "爷爷", "外公", False),
        ("kinship", "zh", "伯伯", "叔叔", False),
        ("kinship", "en", "son-in-law", "Son-in-law", True),
        ("kinship", "en", "son-in-law", "son", False),
        ("kinship", "en", "son", "son-in-law", False),
        ("kinship", "en", "father", "grandfather", False),
        ("arithmetic", "en", "15", "15", True),
        ("arithmetic", "en", "15", "12 - 5 = 7. 7 + 8 = 15. So the answer is 15.", True),
        ("arithmetic", "en", "15", "15 apples", True),
        ("arithmetic", "en", "15", "12-5=7, 7+8=15", True),
        ("arithmetic", "en", "15", "-15", False),
        ("arithmetic", "en", "15", "115", False),
        ("arithmetic", "en", "15", "15 - 2 = 13", False),
        ("arithmetic", "zh", "15", "所以答案是15个。", True),
        ("arithmetic", "zh", "15", "没有数字", False),
    ],
)
def test_is_correct(task, language, answer, output, right):
    assert is_correct(Instance(task, language, "?", answer, "because", "id"), output) is right


def test_a_translation_is_compared_without_punctuation_only():
    instance = Instance("translate-en-zh", "en", "?", "打开文件……", "", "id")
    assert is_correct(instance, "打开文件。")
    assert not is_correct(instance, "打开文件夹……")
    assert not is_correct(instance, "答案是打开文件")


# --- translation and poems ---


@pytest.mark.parametrize("task", ["translate-en-zh", "translate-zh-en"])
def test_pairs_that_share_a_sentence_stay_together(task):
    """Three pairs each, linked by a translation in common: each is on one side as a whole, in both directions."""
    links = [
        pair
        for n in range(300)
        for pair in ((f"Save {n}", f"保存{n}"), (f"save {n} …", f"存储{n}"), (f"Store {n}", f"存储{n}。"))
    ]
    found = {split: list(generate(task, "en", split, 0, links)) for split in ("train", "test", "all")}
    numbers = {
        split: {re.search(r"\d+", instance.question)[0] for instance in found[split]} for split in ("train", "test")
    }
    assert not numbers["train"] & numbers["test"]
    assert len(numbers["train"] | numbers["test"]) == 300
    assert len(found["all"]) == len(found["train"]) + len(found["test"]) == 600  # of doubles, the first counts


def test_the_order_of_the_pairs_does_not_move_them():
    links = [(f"Save {n // 2}", f"保存{n // 3}") for n in range(600)]
    shuffled = links[:]
    Random(1).shuffle(shuffled)
    one, other = (
        {instance.question.partition(": ")[2] for instance in generate("translate-en-zh", "en", "test", 0, material)}
        for material in (links, shuffled)
    )
    assert {re.sub(r"\D", "", text) for text in one} == {re.sub(r"\D", "", text) for text in other}


def test_both_directions_have_the_same_pairs_on_each_side():
    forth = {instance.answer for instance in generate("translate-en-zh", "en", "test", 0, PAIRS)}
    questions = [instance.question for instance in generate("translate-zh-en", "zh", "test", 1, PAIRS)]
    back = {re.split("文：|？", question)[1] for question in questions}
    assert forth == back
    assert 20 < len(forth) < 90


def test_pairs_that_are_too_long_or_empty_are_left_out():
    odd = [("a" * 161, "长"), ("long", "长" * 61), ("two\nlines", "两行"), ("", "空"), ("Fine", "好")]
    assert [instance.answer for instance in generate("translate-en-zh", "en", "all", 0, odd)] == ["好"]
    with pytest.raises(DataError, match="has an English and a Chinese sentence, this one 3"):
        list(generate("translate-en-zh", "en", "all", 0, [("a", "b", "c")]))


def test_jupyterlab_sentences():
    try:
        assets.path("jupyterlab-zh")
    except assets.AssetError as error:
        pytest.skip(f"asset not fetched: {error}")
    sides = {}
    for split in ("train", "test"):
        instances = list(generate("translate-en-zh", "zh", split))
        given = {
            bare(re.sub("^(翻译成中文：|把这句话译成中文：|这句话用中文怎么说？)", "", i.question)) for i in instances
        }
        sides[split] = (given, {bare(instance.answer) for instance in instances}, len(instances))
    assert not sides["train"][0] & sides["test"][0]
    assert not sides["train"][1] & sides["test"][1]
    assert sides["train"][2] > 2000
    assert 200 < sides["test"][2] < 500


def test_the_lines_of_a_poem_stay_together():
    found = {split: list(generate("next-line", "zh", split, 0, POEMS)) for split in ("train", "test")}
    poems = {split: {instance.answer.split("首")[0] for instance in found[split]} for split in found}
    assert not poems["train"] & poems["test"]
    assert len(poems["train"] | poems["test"]) == 200
    assert len(found["train"]) + len(found["test"]) == 600
    for instance in found["train"]:
        poem, line = map(int, re.search(r"第(\d+)首第(\d+)句", instance.question).groups())
        assert instance.answer == f"第{poem}首第{line + 1}句"


def test_a_line_that_goes_on_in_two_ways_is_not_asked_for():
    poems = [["春风，", "又绿"], ["春风", "不度"], ["明月", "何时", "照我"], ["明月。", "何时"]]
    found = {instance.question[1:3]: instance.answer for instance in generate("next-line", "en", "all", 0, poems)}
    asked = " ".join(instance.question for instance in generate("next-line", "en", "all", 0, poems))
    assert "春风" not in asked
    assert len(found) == 2
    assert sorted(found.values()) == ["何时", "照我"]


# --- errors and the command ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("babi17", "en", "train"), "no task 'babi17'; known: babi15, babi16"),
        (("babi15", "fr", "train"), "no language 'fr'; known: en, zh"),
        (("babi15", "en", "dev"), "no split 'dev'; known: train, test, all"),
        (("babi15", "en", "train", 0, PAIRS), "it takes no material"),
    ],
)
def test_errors_come_at_the_call(arguments, message):
    with pytest.raises(DataError, match=message):
        generate(*arguments)


def test_poems_are_needed():
    with pytest.raises(DataError, match="next-line needs poems"):
        next(generate("next-line", "zh", "train"))


def command(*arguments):
    return cli.main(["data", "tasks", *arguments])


def test_command(capsys):
    assert command("--task", "babi15", "--language", "zh", "--split", "test", "-n", "3", "--cot") == 0
    shown = capsys.readouterr().out
    assert shown.count("[babi15-zh-") == shown.count("所以答案是") == 3
    assert command("--task", "kinship", "-n", "4", "--jsonl", "--seed", "9") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [instance.conversation() for instance in some("kinship", "en", "train", 4, seed=9)]


def test_command_with_a_file(tmp_path, capsys):
    file = tmp_path / "poems.txt"
    file.write_text("\ufeff床前明月光\n疑是地上霜\n\n\n白日\x1b[2J依山尽\n黄河入海流\n", encoding="utf-8")
    assert tasks_cli.read_blocks(file) == [["床前明月光", "疑是地上霜"], ["白日\x1b[2J依山尽", "黄河入海流"]]
    assert command("--task", "next-line", "--split", "all", "--file", str(file)) == 0
    shown = capsys.readouterr().out
    assert "疑是地上霜" in shown
    assert "\x1b" not in shown


def test_command_tells_errors_in_one_line(tmp_path, capsys):
    assert command("--task", "next-line") == 2
    assert capsys.readouterr().err.startswith("aquila2-tut: the task next-line needs poems")
    broken = tmp_path / "poems.txt"
    broken.write_bytes(b"\xff\xfe\x00")
    assert command("--task", "next-line", "--file", str(broken)) == 2
    assert "poems.txt: cannot be read as UTF-8 text" in capsys.readouterr().err
