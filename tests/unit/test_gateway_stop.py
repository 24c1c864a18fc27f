from hypothesis import given
from hypothesis import strategies as st

from tercet.roles.gateway.stop import StopMatcher

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@given(st.lists(TEXTS, max_size=12), STOPS)
def test_pieces_give_what_the_whole_text_gives(pieces, stops):
    """Oracle: of the prefixes of the text, the first that contains a stop string is cut where that one begins."""
    matcher = StopMatcher(stops)
    out = "".join(matcher.push(piece) for piece in pieces)
    out += matcher.flush()
    assert out == _oracle(pieces, stops)


def _oracle(pieces, stops):
    text = ""
    for piece in pieces:
        text += piece
        starts = [text.find(s) for s in stops if s in text]
        if starts:
            return text[: min(starts)]
    return text


@given(TEXTS, STOPS)
def test_holds_back_no_more_than_needed(text, stops):
    matcher = StopMatcher(stops)
    out = matcher.push(text)
    held = text[len(out) :]
    assert matcher.found or held == "" or any(s.startswith(held) for s in stops)


def test_a_stop_string_is_cut_across_pieces():
    matcher = StopMatcher(("lo!",))
    assert [matcher.push(p) for p in ("Hel", "l", "o", "! x", "y")] == ["He", "l", "", "", ""]
    assert matcher.found
