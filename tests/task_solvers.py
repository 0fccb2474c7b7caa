"""Solvers of the generated tasks that see nothing but the text: they read its sentences into facts and reason forward.

They share no table with the generators. A sentence that they cannot read is an error.
"""

import json
import re
from itertools import product

ONE_OF_MANY = {"mice": "mouse", "wolves": "wolf", "foxes": "fox", "sheep": "sheep"}
UNIT = "[只条头匹]"


def singular(many):
    return ONE_OF_MANY.get(many.lower(), many.lower().removesuffix("s"))


def sentences(text, language):
    return re.split(r"(?<=[.?]) ", text) if language == "en" else re.findall("[^。？]+[。？]", text)


def read(text, language, patterns):
    """Every sentence as (kind, its words), by the first pattern that fits it whole."""
    for sentence in sentences(text, language):
        for kind, pattern in patterns[language]:
            if found := pattern.fullmatch(sentence):
                yield kind, found.groupdict()
                break
        else:
            raise AssertionError(f"cannot read {sentence!r}")


def compiled(table):
    return {language: [(kind, re.compile(pattern)) for kind, pattern in rows] for language, rows in table.items()}


# --- deduction and induction ---

ANIMALS = compiled(
    {
        "en": [
            ("fear", r"(?P<a>\w+) (?:are (?:afraid|scared) of|fear) (?P<b>\w+)\."),
            ("is", r"(?P<a>\w+) is an? (?P<b>\w+)\."),
            ("is", r"There is an? (?P<b>\w+) called (?P<a>\w+)\."),
            ("colour", r"The color of (?P<a>\w+) is (?P<b>\w+)\."),
            ("colour", r"(?P<a>\w+) is (?P<b>\w+)\."),
            ("ask-fear", r"(?:What|Which animals) (?:is|does) (?P<a>\w+) (?:afraid of|fear)\?"),
            ("ask-colour", r"(?:What|Which) color is (?P<a>\w+)\?|What is the color of (?P<b>\w+)\?"),
        ],
        "zh": [
            ("ask-fear", r"(?:请问)?(?P<a>.+?)(?:害)?怕什么(?:动物)?？"),
            ("ask-colour", r"(?:请问)?(?P<a>.+?)(?:是什么颜色的?|的颜色是什么)？"),
            ("fear", r"(?P<a>.+?)[都害]?怕(?P<b>.+)。"),
            ("is", rf"有一{UNIT}(?P<b>.+)叫(?P<a>.+)。"),
            ("is", rf"(?P<a>.+)是一{UNIT}(?P<b>.+)。"),
            ("colour", r"(?P<a>.+)的颜色是(?P<b>.+色)。"),
            ("colour", r"(?P<a>.+)是(?P<b>.+色)的。"),
        ],
    }
)


def animal_facts(text, language):
    """({(kind, a, b)}, the one asked about); species in the singular."""
    facts, asked = set(), None
    for kind, words in read(text, language, ANIMALS):
        a, b = words.get("a"), words.get("b")
        if kind.startswith("ask"):
            asked = a or b
            continue
        if language == "en" and kind == "fear":
            a, b = singular(a), singular(b)
        facts.add((kind, a, b))
    return facts, asked


def solve_fears(text, language):
    """All that the one asked about is afraid of: what a kind is afraid of, each of the kind is afraid of."""
    facts, asked = animal_facts(text, language)
    kinds = {b for kind, a, b in facts if kind == "is" and a == asked}
    return {b for kind, a, b in facts if kind == "fear" and a in kinds}


def solve_colours(text, language):
    """All colours that another of the same kind has."""
    facts, asked = animal_facts(text, language)
    assert not any(kind == "colour" and a == asked for kind, a, _ in facts)
    kinds = {b for kind, a, b in facts if kind == "is" and a == asked}
    alike = {a for kind, a, b in facts if kind == "is" and b in kinds}
    return {b for kind, a, b in facts if kind == "colour" and a in alike}


# --- arithmetic ---

SUMS = compiled(
    {
        "en": [
            (
                "×",
                r"(?P<who>\w+) had (?P<a>\d+) \w+(?:,| with)(?: each with)? (?P<b>\d+) (?P<thing>\w+)(?: in each)?\.",
            ),
            ("start", r"(?:At first )?(?P<who>\w+) had (?P<a>\d+) (?P<thing>\w+)\."),
            ("-", r"(?:\w+ |After that )?(?P<they>[Hh]e|[Ss]he) (?:gave|lost|sold) (?P<a>\d+)(?: to \w+)?\."),
            ("+", r"(?:\w+ |After that )?(?P<they>[Hh]e|[Ss]he) (?:bought|found|got) (?P<a>\d+) more(?: from \w+)?\."),
            ("ask", r"How many (?P<thing>\w+) does (?P<who>\w+) have (?:now|in the end)\?"),
        ],
        "zh": [
            ("×", r"(?P<who>..)(?:原来)?有(?P<a>\d+)(?P<box>.)(?P<thing>.+)，每(?P=box)(?P<b>\d+)(?P<unit>.)。"),
            ("start", r"(?P<who>..)(?:原来)?有(?P<a>\d+)(?P<unit>.)(?P<thing>.+)。"),
            ("-", r"(?:然后|后来)?(?P<they>[他她])(?:送给..|弄丢了|卖掉了)(?P<a>\d+)(?P<unit>.)。"),
            ("+", r"(?:然后|后来)?(?P<they>[他她])又(?:买了|找到)(?P<a>\d+)(?P<unit>.)。"),
            ("+", r"(?:然后|后来)?..又送给(?P<they>[他她])(?P<a>\d+)(?P<unit>.)。"),
            ("ask", r"(?:现在)?(?P<who>..)(?:现在有|一共有)多少(?P<unit>.)(?P<thing>.+)？"),
        ],
    }
)


def sum_facts(text, language):
    """([(sign, number), ...] in the order of the story, the first with "start")."""
    steps, same = [], {}
    for kind, words in read(text, language, SUMS):
        for name in ("who", "thing", "unit", "they"):
            if name in words:
                assert same.setdefault(name, words[name].lower()) == words[name].lower(), f"another {name} in {text!r}"
        if kind == "×":
            steps += [("start", int(words["a"])), ("×", int(words["b"]))]
        elif kind != "ask":
            steps.append((kind, int(words["a"])))
    return steps


def solve_sum(text, language):
    (start, total), *steps = sum_facts(text, language)
    assert start == "start"
    for sign, number in steps:
        total = total * number if sign == "×" else total + number if sign == "+" else total - number
    return {str(total)}


# --- kinship ---

KIN = compiled(
    {
        "en": [
            ("is", r"(?P<a>\w+)'s (?P<r>\w+) is (?P<b>\w+)\."),
            ("is", r"(?P<b>\w+) is (?P<a>\w+)'s (?P<r>\w+)\."),
            ("is", r"(?P<b>\w+) is the (?P<r>\w+) of (?P<a>\w+)\."),
            ("is", r"(?P<a>\w+) and (?:his|her) (?P<r>\w+) (?P<b>\w+) [a-z ]+\."),
            ("ask", r"How is (?P<b>\w+) related to (?P<a>\w+)\?"),
            ("ask", r"(?:Who|What) is (?P<b>\w+) to (?P<a>\w+)\?"),
        ],
        "zh": [
            ("is", r"(?P<a>..)的(?P<r>..)[是叫](?P<b>..)。"),
            ("is", r"(?P<b>..)是(?P<a>..)的(?P<r>..)。"),
            ("is", r"(?P<a>..)和(?P<r>..)(?P<b>..)一起.+。"),
            ("ask", r"(?:按亲属关系，)?(?P<b>..)是(?P<a>..)的(?:什么人|谁)？"),
        ],
    }
)
# What one sentence says of (its subject a, the relative b): sex of b, and a fact.
BASIC = {
    "father": ("m", "parent", "b", "a"),
    "mother": ("f", "parent", "b", "a"),
    "son": ("m", "parent", "a", "b"),
    "daughter": ("f", "parent", "a", "b"),
    "brother": ("m", "sibling", "a", "b"),
    "sister": ("f", "sibling", "a", "b"),
    "husband": ("m", "spouse", "a", "b"),
    "wife": ("f", "spouse", "a", "b"),
}
CHINESE = {
    **{"爸爸": "father", "妈妈": "mother", "儿子": "son", "女儿": "daughter", "丈夫": "husband", "妻子": "wife"},
    **{"哥哥": "brother", "弟弟": "brother", "姐姐": "sister", "妹妹": "sister"},
}
OLDER, YOUNGER = {"哥哥", "姐姐"}, {"弟弟", "妹妹"}


def kin_facts(text, language):
    """({(a, relation, b)}: b is a's relation, (a, b) asked about)."""
    facts, asked = set(), None
    for kind, words in read(text, language, KIN):
        if kind == "ask":
            asked = (words["a"], words["b"])
        else:
            facts.add((words["a"], words["r"], words["b"]))
    return facts, asked


class Family:
    """The facts of a story and what follows from them about parents, siblings, spouses, sexes and ages."""

    def __init__(self, facts):
        self.parent, self.sibling, self.spouse, self.older, self.sex = set(), set(), set(), set(), {}
        for a, relation, b in facts:
            sex, kind, first, second = BASIC[CHINESE.get(relation, relation)]
            assert self.sex.setdefault(b, sex) == sex
            who = {"a": a, "b": b}
            getattr(self, kind).add((who[first], who[second]))
            if relation in OLDER | YOUNGER:
                self.older.add((b, a) if relation in OLDER else (a, b))
        self.people = {person for a, _, b in facts for person in (a, b)}
        self.saturate()
        self.check()

    def saturate(self):
        """Spouses and siblings are so to each other; siblings share parents; children of one parent are siblings."""
        before = None
        while before != (before := len(self.parent) + len(self.sibling) + len(self.spouse) + len(self.older)):
            self.spouse |= {(b, a) for a, b in self.spouse}
            self.sibling |= {(b, a) for a, b in self.sibling}
            self.sibling |= {(a, d) for (a, b), (c, d) in product(self.sibling, repeat=2) if b == c and a != d}
            self.sibling |= {(b, d) for (a, b), (c, d) in product(self.parent, repeat=2) if a == c and b != d}
            self.parent |= {(p, y) for (p, x), (z, y) in product(self.parent, self.sibling) if x == z}
            self.older |= {(a, d) for (a, b), (c, d) in product(self.older, repeat=2) if b == c}
        for one, other in self.spouse:
            if one in self.sex:
                self.sex.setdefault(other, "m" if self.sex[one] == "f" else "f")

    def check(self):
        """Nobody has two fathers, is a relative of themselves, or older and younger at once: the story can be true."""
        assert all(a != b for facts in (self.parent, self.sibling, self.spouse, self.older) for a, b in facts)
        assert not self.parent & {(b, a) for a, b in self.parent}
        for child in self.people:
            sexes = [self.sex.get(p) for p, c in self.parent if c == child]
            assert sexes.count("m") <= 1
            assert sexes.count("f") <= 1

    def parents(self, x, sex="mf"):
        return {p for p, c in self.parent if c == x and self.sex.get(p, "?") in sex}

    def children(self, x, sex="mf"):
        return {c for p, c in self.parent if p == x and self.sex.get(c, "?") in sex}

    def siblings(self, x, sex="mf", age=None):
        found = {b for a, b in self.sibling if a == x and self.sex.get(b, "?") in sex}
        if age is None:
            return found
        return {b for b in found if ((b, x) if age == "older" else (x, b)) in self.older}

    def spouses(self, x, sex="mf"):
        return {b for a, b in self.spouse if a == x and self.sex.get(b, "?") in sex}


def each(people, step, *arguments):
    return {found for one in people for found in step(one, *arguments)}


def chinese_terms(f, a):
    """For every Chinese term, who is it of a; each defined by parents, siblings, spouses, sexes and ages alone."""
    father, mother, wife, husband = f.parents(a, "m"), f.parents(a, "f"), f.spouses(a, "f"), f.spouses(a, "m")
    terms = {"爸爸": father, "妈妈": mother, "妻子": wife, "丈夫": husband}
    terms |= {"儿子": f.children(a, "m"), "女儿": f.children(a, "f")}
    terms |= {"哥哥": f.siblings(a, "m", "older"), "弟弟": f.siblings(a, "m", "younger")}
    terms |= {"姐姐": f.siblings(a, "f", "older"), "妹妹": f.siblings(a, "f", "younger")}
    terms |= {"爷爷": each(father, f.parents, "m"), "奶奶": each(father, f.parents, "f")}
    terms |= {"外公": each(mother, f.parents, "m"), "外婆": each(mother, f.parents, "f")}
    terms |= {"伯伯": each(father, f.siblings, "m", "older"), "叔叔": each(father, f.siblings, "m", "younger")}
    terms |= {"姑姑": each(father, f.siblings, "f"), "姨妈": each(mother, f.siblings, "f")}
    terms["舅舅"] = each(mother, f.siblings, "m")
    for spouse, of, sex in (("伯母", "伯伯", "f"), ("婶婶", "叔叔", "f"), ("舅妈", "舅舅", "f"), ("姑父", "姑姑", "m")):
        terms[spouse] = each(terms[of], f.spouses, sex)
    terms["姨父"] = each(terms["姨妈"], f.spouses, "m")
    paternal, maternal = each(father, f.siblings, "m"), terms["姑姑"] | terms["舅舅"] | terms["姨妈"]
    terms |= {"堂兄弟": each(paternal, f.children, "m"), "堂姐妹": each(paternal, f.children, "f")}
    terms |= {"表兄弟": each(maternal, f.children, "m"), "表姐妹": each(maternal, f.children, "f")}
    brothers, sisters = f.siblings(a, "m"), f.siblings(a, "f")
    terms |= {"侄子": each(brothers, f.children, "m"), "侄女": each(brothers, f.children, "f")}
    terms |= {"外甥": each(sisters, f.children, "m"), "外甥女": each(sisters, f.children, "f")}
    sons, daughters = terms["儿子"], terms["女儿"]
    terms |= {"孙子": each(sons, f.children, "m"), "孙女": each(sons, f.children, "f")}
    terms |= {"外孙": each(daughters, f.children, "m"), "外孙女": each(daughters, f.children, "f")}
    terms |= {"儿媳": each(sons, f.spouses, "f"), "女婿": each(daughters, f.spouses, "m")}
    terms |= {"岳父": each(wife, f.parents, "m"), "岳母": each(wife, f.parents, "f")}
    terms |= {"公公": each(husband, f.parents, "m"), "婆婆": each(husband, f.parents, "f")}
    terms |= {"嫂子": each(terms["哥哥"], f.spouses, "f"), "弟媳": each(terms["弟弟"], f.spouses, "f")}
    terms |= {"姐夫": each(terms["姐姐"], f.spouses, "m"), "妹夫": each(terms["妹妹"], f.spouses, "m")}
    for names, spouse in (("大舅子 小舅子 大姨子 小姨子", wife), ("大伯子 小叔子 大姑子 小姑子", husband)):
        kinds = [("m", "older"), ("m", "younger"), ("f", "older"), ("f", "younger")]
        terms |= {name: each(spouse, f.siblings, *kind) for name, kind in zip(names.split(), kinds, strict=True)}
    return terms


def english_terms(f, a):
    """The same for English."""
    parents, children, spouses, siblings = f.parents(a), f.children(a), f.spouses(a), f.siblings(a)
    relatives = each(parents, f.siblings)
    terms = {}
    male = "father son brother husband grandfather grandson uncle nephew father-in-law son-in-law brother-in-law"
    female = (
        "mother daughter sister wife grandmother granddaughter aunt niece mother-in-law daughter-in-law sister-in-law"
    )
    for sex, names in (("m", male), ("f", female)):
        rows = [f.parents(a, sex), f.children(a, sex), f.siblings(a, sex), f.spouses(a, sex)]
        rows += [each(parents, f.parents, sex), each(children, f.children, sex)]
        rows += [each(parents, f.siblings, sex) | each(relatives, f.spouses, sex), each(siblings, f.children, sex)]
        rows += [each(spouses, f.parents, sex), each(children, f.spouses, sex)]
        rows += [each(spouses, f.siblings, sex) | each(siblings, f.spouses, sex)]
        terms |= dict(zip(names.split(), rows, strict=True))
    return terms | {"cousin": each(relatives, f.children)}


def solve_kinship(text, language):
    """Every term that b is of a."""
    facts, (a, b) = kin_facts(text, language)
    terms = (chinese_terms if language == "zh" else english_terms)(Family(facts), a)
    return {term for term, people in terms.items() if b in people}


SOLVERS = {"babi15": solve_fears, "babi16": solve_colours, "arithmetic": solve_sum, "kinship": solve_kinship}


# --- booking ---

HOURS = {
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"],
    "zh": ["零", "一", "两", "三", "四", "五", "六", "七", "八", "九", "十", "十一"],
}
FIELDS = {"en": ("name", "place", "day", "time", "people"), "zh": ("姓名", "餐厅", "日期", "时间", "人数")}
PLACES_ZH = (
    "灯影|竹影|望江|银杏|翠玉|桂香|海湾|枫林|明月|听雨|青松|荷风|柳岸|石桥|幽兰|云水",
    "居|小厨|台|园|楼|轩|坊|阁",
)
BOOKING = {
    "en": {
        "name": r"(?:under the name|This is|My name is|Hello,|record\.) ([A-Z][a-z]+)(?:\.| would| here)",
        "place": r"the ([A-Z]\w+ [A-Z]\w+)",
        "day": r"(\w+day)",
        "time": r"(half past )?(\w+) in the (\w+)",
        "people": r"\b(?:table for|There are|, for) (\w+)(?: of us| at the|\.|,|, please)",
    },
    "zh": {
        "name": r"(?:名字写|我叫|用|这里是|记录。(?=..要在))(..)(?:。|，|的名字|要在)",
        "place": rf"((?:{PLACES_ZH[0]})(?:{PLACES_ZH[1]}))",
        "day": r"(?:周|星期|礼拜)([一二三四五六日天])",
        "time": r"(上午|下午|晚上)(十一|.)点(半?)",
        "people": r"([一两三四五六七八九])(?:个人|位|人)",
    },
}


def solve_booking(text, language):
    """The record, as a set of the one text that it is."""
    found = {}
    for field, pattern in BOOKING[language].items():
        (found[field],) = set(re.findall(pattern, text))
    first, hour, last = found["time"]
    half, part = (first, last) if language == "en" else (last, first)
    clock = f"{HOURS[language].index(hour)}:{'30' if half else '00'}"
    found["time"] = f"{clock} {'am' if part == 'morning' else 'pm'}" if language == "en" else part + clock
    if language == "zh":
        found["day"] = "周" + found["day"].replace("天", "日")
    found["people"] = HOURS[language].index(found["people"])
    record = {word: found[key] for word, key in zip(FIELDS[language], BOOKING[language], strict=True)}
    return {json.dumps(record, ensure_ascii=False)}
