import pytest

from cocoa_embed.captioning.prompts import Answer, Prompts, Request

PROMPTS = Prompts.load()
DETAILED, BRIEF = Request("detailed", "?"), Request("brief", "?")
QUESTIONS = Request("questions", "?")


def test_prompts_are_asked_once_and_then_again_with_other_draws_with_the_label_before_each() -> None:
    names = list(PROMPTS.captions)
    asked = PROMPTS.requests(len(names) + 1, 2, 'a "cat"', True)
    assert [(each.name, each.is_drawn) for each in asked] == [
        *((name, False) for name in names),
        (names[0], True),
        ("questions", False),
    ]
    assert all('"a "cat""' in each.prompt for each in asked)
    assert "2 different questions" in asked[-1].prompt
    unguided = PROMPTS.requests(3, 0, None, are_followed=False)
    assert [(each.name, each.is_drawn) for each in unguided] == [(names[0], drawn) for drawn in (False, True, True)]


def test_equal_wordings_are_one_and_lines_and_quotes_are_no_part_of_a_caption() -> None:
    texts = PROMPTS.read([DETAILED, BRIEF], [Answer('"A red\n circle."\n'), Answer("a RED circle")])
    assert texts == {"captions": {"A red circle.": "detailed"}, "questions": [], "unusable": []}


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("I'm sorry, but I can't help with that."), "refused"),
        (Answer("I’m unable to see images."), "refused"),
        (Answer("As an AI, I have no eyes."), "refused"),
        (Answer("A person.", is_refused=True), "refused"),
        (Answer("  \n"), "empty"),
        (Answer("..."), "empty"),
        (Answer("A man who", is_cut=True), "cut off"),
    ],
)
def test_refusals_empty_answers_and_half_sentences_are_no_captions(answer: Answer, fault: str) -> None:
    texts = PROMPTS.read([DETAILED, BRIEF], [answer, Answer("A sorry dog.")])
    assert list(texts["captions"]) == ["A sorry dog."]
    (reason,) = texts["unusable"]
    assert reason.startswith("detailed: ")
    assert fault in reason


def test_an_answer_that_was_cut_off_keeps_its_whole_sentences() -> None:
    cut = PROMPTS.read([DETAILED], [Answer("One dog, 3.5 m away. Two cats. Thr", is_cut=True)])
    assert list(cut["captions"]) == ["One dog, 3.5 m away. Two cats."]


@pytest.mark.parametrize(
    "text",
    [
        "Q: What is red?\nA: The ball\n is red.\nQ: How many?\nA: Two.",
        "Sure!\n\n**Q1:** What is red?\n**A1:** The ball is red.\n\n**Q2:** How many?\n**A2:** Two.",
        "1. Question: What is red?\n   Answer: The ball is red.\n2. Question: How many?\n   Answer: Two.\n"
        "3. Question: how many?\n   Answer: Three.",
        "Q: What is red?\n\n---\nA: **The ball is red.**\n\n---\n\n2.\nQ: How many?\nA: Two. **\n",
    ],
)
def test_question_answer_pairs_are_read_in_the_forms_that_models_write(text: str) -> None:
    expected = [
        {"question": "What is red?", "answer": "The ball is red."},
        {"question": "How many?", "answer": "Two."},
    ]
    assert PROMPTS.read([QUESTIONS], [Answer(text)])["questions"] == expected


def test_a_question_without_an_answer_is_no_pair_and_another_mark_of_the_same_kind_is_text() -> None:
    text = "A: So.\nQ: Where?\nA:\nQ: Who?\nQ: What is red?\nA: 12\n13\nA: balls.\n\n2.\nQ: How many?\nA: In all\n12"
    assert [(each["question"], each["answer"]) for each in PROMPTS.read([QUESTIONS], [Answer(text)])["questions"]] == [
        ("Who? Q: What is red?", "12 13 A: balls."),
        ("How many?", "In all 12"),
    ]


def test_an_answer_of_line_ends_is_read_at_once() -> None:
    """It would take hours if each mark looked for another one after all line ends."""
    assert PROMPTS.read([QUESTIONS], [Answer(("Q: a\n" + "\n" * 20) * 1000)])["questions"] == []
    for answer in ("Q:" + "\n" * 1000 + "x", "Q: What?" + "\n" * 1000 + "x", "Q: What?\nA: It" + "\n" * 1000 + "is."):
        assert len(PROMPTS.read([QUESTIONS], [Answer(answer)])["questions"]) == answer.endswith("is.")


def test_a_cut_answer_loses_its_last_pair_and_is_unusable_without_pairs() -> None:
    pairs = Answer("Q: What is red?\nA: The ball.\nQ: How many?\nA: Tw", is_cut=True)
    assert [each["answer"] for each in PROMPTS.read([QUESTIONS], [pairs])["questions"]] == ["The ball."]
    (reason,) = PROMPTS.read([QUESTIONS], [Answer("What is red? The ball.")])["unusable"]
    assert reason.startswith("questions: no lines with Q: and A:")
