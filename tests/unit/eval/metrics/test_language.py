"""Scripts of all kinds, languages with enough function words, and no language without them."""

import pytest

from eval.metrics.language import UNKNOWN_LATIN, language, languages, script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plan my trip?", "Latin"),
        ("Où est l'été à Zürich?", "Latin"),
        ("Как дела, мир? ok", "Cyrillic"),
        ("旅行の計画を立ててください", "Japanese"),
        ("请帮我计划一次旅行", "Chinese characters"),
        ("여행 계획을 세워 주세요", "Korean"),
        ("كيف حالك", "Arabic"),
        ("मेरी यात्रा", "Devanagari"),
        ("12 + 30 = 42 🙂", "no letters"),
        ("", "no letters"),
        ("\ud800 \x00", "no letters"),
    ],
)
def test_the_script_of_most_letters(text, expected):
    assert script(text) == expected


SENTENCES = {
    "English": "It was the best answer that I have seen, and it is not too long for what you asked.",
    "German": "Das ist nicht die Antwort, die ich mir gewünscht habe, aber sie ist auch nicht schlecht.",
    "French": "Ce n'est pas la réponse que je voulais, mais elle est plus utile pour les débutants.",
    "Spanish": "No es la respuesta que yo quería, pero se entiende y es útil para los que empiezan.",
    "Portuguese": "Não é a resposta que eu queria, mas é mais útil para quem não tem uma ideia do assunto.",
    "Italian": "Non è la risposta che volevo, ma è più utile per chi non ha una idea della cosa.",
    "Dutch": "Dit is niet het antwoord dat ik wilde, maar het is een goed begin voor wie er niets van weet.",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_function_words_give_the_language(name):
    assert language(SENTENCES[name]) == language(SENTENCES[name].upper()) == name


@pytest.mark.parametrize("text", ["Stay strong. Partly wrong.", "Zażółć gęślą jaźń", "x = y + z", "the"])
def test_few_function_words_give_no_language(text):
    assert language(text) == UNKNOWN_LATIN


def test_a_short_text_takes_the_commonest_language():
    texts = [SENTENCES["German"], "Tee.", SENTENCES["German"], SENTENCES["English"], "良い答えです", "?"]
    assert languages(texts) == ["German", "German", "German", "English", "Japanese", "no letters"]
    assert languages(["Tee.", "Kaffee."]) == [UNKNOWN_LATIN, UNKNOWN_LATIN]
