from tercet.roles.lru import Lru


def lru(most):
    return Lru(most, lambda key, value: len(value))


def test_the_least_recently_used_go_first():
    kept = lru(30)
    for key in "abc":
        kept.put(key, key * 10)
    assert kept.get("a") == "a" * 10
    kept.put("d", "d" * 10)
    assert [kept.get(key) is None for key in "abcd"] == [False, True, False, False]
    assert kept.size == 30


def test_a_key_has_its_last_value_alone():
    kept = lru(30)
    kept.put("a", "x" * 20)
    kept.put("a", "y" * 25)
    assert (kept.get("a"), kept.size) == ("y" * 25, 25)
    kept.put("a", "z" * 31)  # larger than all that is kept, and what it replaces is no longer true
    assert (kept.get("a"), kept.size) == (None, 0)


def test_nothing_is_kept_without_a_budget():
    kept = lru(0)
    kept.put("a", "x")
    assert kept.get("a") is None
