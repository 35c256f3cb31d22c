"""The budget grammar: what is understood, what is refused and how, what it comes to on a device."""

from __future__ import annotations

import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.errors import BrimError, BudgetSyntaxError
from brim.memory.budget import (
    Budget,
    budget_for,
    budget_from_environment,
    parse_budget,
    parse_budgets,
    tighter,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (1, 1),
        (6442450944, 6 * GIB),
        (np.int64(4096), 4096),
        ("6442450944", 6 * GIB),
        ("512B", 512),
        ("3KiB", 3 * 2**10),
        ("3MiB", 3 * 2**20),
        ("6GiB", 6 * GIB),
        ("2TiB", 2 * 2**40),
        ("3kB", 3_000),
        ("3MB", 3_000_000),
        ("6GB", 6_000_000_000),
        ("2TB", 2 * 10**12),
        ("1.5GiB", 3 * 2**29),
        (".5 GiB", 2**29),
        ("0.5kB", 500),
        ("1.1GiB", 1_181_116_006),  # 1181116006.4: a limit is rounded down
        ("6 GiB", 6 * GIB),
        (" 6\tGiB\n", 6 * GIB),
        ("6gib", 6 * GIB),
        ("6GIB", 6 * GIB),
        ("6gb", 6 * 10**9),
        ("6KB", 6_000),
        ("+6GiB", 6 * GIB),
        (Budget("bytes", 7), 7),
    ],
)
def test_bytes(written: object, count: int) -> None:
    budget = parse_budget(written)
    assert budget == Budget("bytes", count)
    assert budget.resolve(total_bytes=2**62, available_bytes=0) == count


@pytest.mark.parametrize("written", ["80%", "80 %", "80.0%", " 080% "])
def test_percent(written: str) -> None:
    budget = parse_budget(written)
    assert budget == Budget("percent", 80)
    assert hash(budget) == hash(Budget("percent", 80))
    assert budget.resolve(total_bytes=10 * GIB, available_bytes=1) == 8 * GIB
    assert str(budget) == "80%"


@pytest.mark.parametrize("written", [None, "auto", "AUTO", " auto "])
def test_auto_is_the_default(written: str | None) -> None:
    assert parse_budget(written) == Budget("auto")


@pytest.mark.parametrize("written", ["off", "Off", " OFF "])
def test_off(written: str) -> None:
    assert parse_budget(written) == Budget("off")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("6G", ['"6GiB" is 6,442,450,944 B', '"6GB" is 6,000,000,000 B']),
        ("6g", ['"6GiB"', '"6GB"']),
        ("1.5Ki", ['"1.5KiB" is 1,536 B', '"1.5kB" is 1,500 B']),
        ("7 m", ['"7MiB" is 7,340,032 B', '"7MB" is 7,000,000 B']),
        ("2T", ['"2TiB"', '"2TB"']),
        (0, ["no memory", '"off"']),
        ("0", ["no memory", '"off"']),
        ("0GiB", ["no memory"]),
        ("0%", ["no memory"]),
        ("-0", ["no memory"]),
        (-1, ["negative"]),
        ("-1", ["negative"]),
        ("-6 GiB", ["negative"]),
        ("-5%", ["negative"]),
        (float("nan"), ["not a number"]),
        ("NaN", ["not a number"]),
        (float("inf"), ["only", '"off"']),
        (float("-inf"), ["only", '"off"']),
        ("inf", ["only", '"off"']),
        ("-Infinity", ["only", '"off"']),
        ("unlimited", ["only", '"off"']),
        ("none", ["only", '"off"']),
        ("", ["empty", '"auto"']),
        ("  ", ["empty"]),
        (True, ["truth value"]),
        (False, ["truth value"]),
        (np.True_, ["bool"]),
        ("120%", ["120%", "at most 100 %"]),
        ("100.001%", ["at most 100 %"]),
        (f"{'9' * 30}%", ["at most 100 %"]),
        ("6PiB", ["unknown unit 'PiB'", "GiB"]),
        ("6 parsecs", ["unknown unit"]),
        ("6GiBB", ["unknown unit"]),
        ("1.5", ["fraction of a byte"]),
        ("1.5B", ["fraction of a byte"]),
        ("0.0001KiB", ["fraction of a byte"]),
        (0.8, ["fraction of a byte", '"80%"']),
        (1.0, ['"100%"']),
        (6e9, ["6000000000", "whole numbers"]),
        (2.5, ["whole number"]),
        (Decimal("0.5"), ["fraction"]),
        (Fraction(7, 2), ["whole number"]),
        ("6,5GiB", ["decimal point"]),
        ("6_000", ["thousands separators"]),
        ("1e9", ["not understood"]),
        ("GiB", ["not understood"]),
        ("6GiB please", ["not understood"]),
        ("٦GiB", ["not understood"]),  # Arabic-Indic digit six
        (b"6GiB", ["bytes", "not understood"]),
        ([1], ["list", "not understood"]),
        (2**63, ["larger than any memory", '"off"']),
        pytest.param(10**5000, ["larger than any memory"], id="huge"),
        pytest.param(-(10**5000), ["negative"], id="minus huge"),
        ("9" * 25 + "TiB", ["larger than any memory"]),
        pytest.param("9" * 5000, ["not understood"], id="5000 digits"),
    ],
)
def test_refused_with_help(written: object, says: list[str]) -> None:
    with pytest.raises(BudgetSyntaxError) as caught:
        parse_budget(written)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, BrimError)
    text = str(caught.value)
    assert [part for part in says if part not in text] == [], text
    assert len(text) < 300
    assert "\n" not in text


@pytest.mark.parametrize(
    ("kind", "amount"),
    [
        ("bytes", 0),
        ("bytes", -1),
        ("bytes", True),
        ("bytes", 1.5),
        ("bytes", "6"),
        ("percent", 0),
        ("percent", 101),
        ("percent", float("nan")),
        ("percent", Decimal("Infinity")),
        ("percent", "many"),
        ("percent", True),
        ("percent", None),
        ("auto", 5),
        ("off", 5),
        ("unlimited", 0),
    ],
)
def test_no_invalid_budget_can_be_built(kind: str, amount: object) -> None:
    with pytest.raises(BudgetSyntaxError):
        Budget(kind, amount)


def test_budget_is_a_frozen_value() -> None:
    budget = parse_budget("6GiB")
    assert budget == parse_budget("6144MiB")
    assert budget != parse_budget("6GB")
    assert len({budget, parse_budget("6144MiB"), parse_budget("auto")}) == 2
    assert pickle.loads(pickle.dumps(budget)) == budget
    with pytest.raises(AttributeError):
        budget.amount = 1


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (6 * GIB, "6GiB"),
        (6 * 10**9, "6GB"),
        ("1.5GiB", "1536MiB"),
        (1000, "1kB"),
        (1025, "1025B"),
        ("12.50%", "12.5%"),
        ("100%", "100%"),
        ("0.00001%", "0.00001%"),
        (None, "auto"),
        ("OFF", "off"),
    ],
)
def test_text(written: object, text: str) -> None:
    assert str(parse_budget(written)) == text


units = st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"])
budgets = st.one_of(
    st.integers(1, 2**63 - 1).map(lambda count: Budget("bytes", count)),
    st.builds(lambda count, unit: parse_budget(f"{count}{unit}"), st.integers(1, 4000), units),
    st.decimals("0.0001", 100, places=4).map(lambda share: Budget("percent", share)),
    st.sampled_from([Budget("auto"), Budget("off")]),
)


@given(budgets)
def test_text_parses_to_the_same_budget(budget: Budget) -> None:
    assert parse_budget(str(budget)) == budget
    assert str(parse_budget(str(budget))) == str(budget)
    assert parse_budget(f"  {str(budget).upper()} ") == budget


@given(st.text(max_size=20))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BudgetSyntaxError:
        return
    limit = budget.resolve(total_bytes=GIB, available_bytes=GIB // 2)
    assert (limit is None) == (text.strip().casefold() == "off")
    assert limit is None or 0 <= limit <= GIB


@given(
    st.decimals("0.01", "999", places=2),
    st.sampled_from([("KiB", 2**10), ("MiB", 2**20), ("GB", 10**9), ("TiB", 2**40)]),
    st.sampled_from(["", " ", "  "]),
)
def test_decimals_round_down(number: Decimal, unit: tuple[str, int], space: str) -> None:
    name, size = unit
    count = Fraction(number) * size
    assert parse_budget(f"{number}{space}{name}") == Budget("bytes", int(count))
    assert 0 <= count - parse_budget(f"{number}{name}").amount < 1


def test_resolve_never_exceeds_what_is_there() -> None:
    host = {"total_bytes": 10 * GIB, "available_bytes": 4 * GIB, "headroom_bytes": GIB}
    assert parse_budget("6GiB").resolve(**host) == 6 * GIB  # a declaration counts, not what happens to be free
    assert parse_budget("60GiB").resolve(**host) == 10 * GIB
    assert parse_budget("100%").resolve(**host) == 10 * GIB
    assert parse_budget("33.3%").resolve(**host) == 10 * GIB * 333 // 1000
    assert parse_budget("auto").resolve(**host) == 3 * GIB
    assert parse_budget("auto").resolve(10 * GIB, GIB, headroom_bytes=2 * GIB) == 0  # nothing free is not "unlimited"
    assert parse_budget("auto").resolve(GIB, 5 * GIB, headroom_bytes=0) == GIB
    assert parse_budget("off").resolve(**host) is None


def test_one_budget_per_device() -> None:
    written = {"cpu": "2GiB", "CUDA:0 ": "6GB", "*": "50%", "cuda": 4 * GIB, "mydevice": None}
    budgets = parse_budgets(written)
    assert budgets == {
        "cpu": Budget("bytes", 2 * GIB),
        "cuda:0": Budget("bytes", 6 * 10**9),
        "*": Budget("percent", 50),
        "cuda": Budget("bytes", 4 * GIB),
        "mydevice": Budget("auto"),
    }
    assert budget_for(budgets, "cpu") == parse_budget("2GiB")
    assert budget_for(budgets, "cuda:0") == parse_budget("6GB")
    assert budget_for(budgets, "cuda:1") == parse_budget("4GiB")
    assert budget_for(budgets, "tpu:3") == parse_budget("50%")
    assert parse_budget(written, device="cuda:0") == parse_budget("6GB")
    assert parse_budgets(" cpu = 2GiB , cuda:0=6GB,*=50%")["cuda:0"] == parse_budget("6GB")
    assert budget_for(parse_budgets("cuda:0=6GB"), "cuda") == parse_budget("6GB")
    assert budget_for(parse_budgets("cuda:0=6GB"), "cuda:1") == Budget("auto")
    assert parse_budgets("6GiB") == {"*": parse_budget("6GiB")}
    assert parse_budgets({}) == parse_budgets(None) == {"*": Budget("auto")}
    assert parse_budget({"*": "6GiB"}) == parse_budget("6GiB")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"cpu": "6G"}, ["'cpu'", '"6GiB"']),
        ({"cpu": {"a": 1}}, ["'cpu'", "dict"]),
        ({"gpu zero": "6GiB"}, ["'gpu zero'", '"cuda:0"']),
        ({0: "6GiB"}, ["'0'", "no device name"]),
        ({"cpu": 1, "CPU": 2}, ["two budgets", "'cpu'"]),
        ("cpu=1GiB,cpu=2GiB", ["two budgets"]),
        ("2GiB,cuda=1GiB", ["'2GiB'", "*="]),
        ("cpu=", ["'cpu'", "empty"]),
        ("=2GiB", ["no device name"]),
        ("cpu=1GiB,", ["names no device"]),
    ],
)
def test_device_budgets_refused_with_help(written: object, says: list[str]) -> None:
    with pytest.raises(BudgetSyntaxError) as caught:
        parse_budgets(written)
    assert [part for part in says if part not in str(caught.value)] == [], str(caught.value)


def test_a_budget_per_device_is_not_one_budget() -> None:
    with pytest.raises(BudgetSyntaxError, match="single device"):
        parse_budget("cpu=2GiB,cuda=6GiB")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRIM_BUDGET", raising=False)
    assert budget_from_environment() == {"*": Budget("auto")}
    monkeypatch.setenv("BRIM_BUDGET", "6GiB")
    assert budget_from_environment() == {"*": parse_budget("6GiB")}
    assert budget_from_environment({"BRIM_BUDGET": "cpu=2GiB,cuda:0=6GiB"})["cuda:0"] == parse_budget("6GiB")
    assert budget_from_environment({"BRIM_BUDGET": "off"}) == {"*": Budget("off")}


@pytest.mark.parametrize("text", ["6G", "", "0", "cpu=120%", "x" * 1000])
def test_environment_errors_name_the_variable(text: str) -> None:
    with pytest.raises(BudgetSyntaxError, match="BRIM_BUDGET") as caught:
        budget_from_environment({"BRIM_BUDGET": text})
    assert len(str(caught.value)) < 400


def test_an_inner_budget_may_only_lower() -> None:
    assert tighter(6 * GIB, 4 * GIB) == 4 * GIB
    assert tighter(6 * GIB, 6 * GIB) == 6 * GIB
    assert tighter(None, 4 * GIB) == 4 * GIB
    assert tighter(None, None) is None
    assert tighter(6 * GIB, 9 * GIB, Budget("auto")) == 6 * GIB
    assert tighter(6 * GIB, 4 * GIB, Budget("auto")) == 4 * GIB
    with pytest.raises(ValueError, match=r"8\.0 GiB is more than 6\.0 GiB"):
        tighter(6 * GIB, 8 * GIB, Budget("bytes", 8 * GIB))
    with pytest.raises(ValueError, match=r"6,442,450,945 B is more than 6,442,450,944 B"):
        tighter(6 * GIB, 6 * GIB + 1)
    with pytest.raises(ValueError, match=r"'off' would lift the limit of 6\.0 GiB"):
        tighter(6 * GIB, None, Budget("off"))
