"""Words of captions: what counts as one, and which are frequent."""

import pyarrow as pa
import pytest

from sharegpt4v.captions import words
from sharegpt4v.captions.words import WordCounts, tokenise


def _counted(*captions: str | None) -> dict[str, int]:
    counts = WordCounts()
    counts.add(tokenise(pa.array(captions, pa.string())))
    return dict(counts.most_common(100))


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ('A "Red"  bus;\n\tA dog\u2019s tail.', "a red bus a dog s tail"),
        ("Ein GROSSES Haus, \u00dcbergröße", "ein grosses haus \u00fcbergröße"),
        ("\u202e\u0000 ... !", ""),
        ("", ""),
        (None, ""),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u6f22\u5b57",
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u6f22\u5b57",
        ),
    ],
)
def test_a_caption_is_its_words_in_lower_case(caption: str | None, text: str) -> None:
    tokens = tokenise(pa.array(["before it", caption, "after"]))

    assert tokens.texts.to_pylist() == ["before it", text, "after"]
    assert tokens.lengths.tolist() == [2, len(text.split()), 1]
    spoken = [tokens.vocabulary[code] for code in tokens.codes]
    assert spoken == ["before", "it", *text.split(), "after"]


def test_a_word_counts_once_a_caption() -> None:
    assert _counted("bus bus bus", "a bus", "Tree, tree") == {"bus": 2, "tree": 1}


def test_stop_words_numbers_and_letters_are_no_content() -> None:
    assert _counted("the dog and 3 x 1999 of them", "x" * 41) == {"dog": 1}


def test_counts_add_up_over_batches_and_equal_ones_stand_in_the_order_of_the_alphabet() -> None:
    counts = WordCounts()
    for batch in (["zebra apple"], [], ["apple boat", "boat zebra"]):
        counts.add(tokenise(pa.array(batch, pa.string())))
    assert counts.most_common(2) == [("apple", 2), ("boat", 2)]


def test_rare_words_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "VOCABULARY", 100)
    counts = WordCounts()
    for start in range(0, 1_000, 50):
        counts.add(tokenise(pa.array([f"bus word{n}" for n in range(start, start + 50)])))

    found = counts.most_common(1_000)
    assert found[0] == ("bus", 1_000) and len(found) <= 100


def test_an_endless_caption_is_read_to_a_limit() -> None:
    tokens = tokenise(pa.array(["word " * 1_000_000]))
    assert tokens.lengths.tolist() == [words.CHARACTERS // 5]
