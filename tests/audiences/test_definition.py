import re
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from audience_sync.audiences.definition import check_key, key_from_name
from audience_sync.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Order Completed Last 30days", "order_completed_last_30days"),
        ("OrderCompleted", "order_completed"),
        ("HTTPServer errors", "http_server_errors"),
        ("iOS App", "ios_app"),
        ("VIPs", "vips"),
        ("A  - B", "a_b"),
        ("first-time shopper", "first_time_shopper"),
        ("  Spent > £100!  ", "spent_100"),
        ("Café Über", "cafe_uber"),
        ("caféOrder", "cafe_order"),
        ("total_spend", "total_spend"),
        ("30Days", "30days"),
        # Latin letters that have no decomposition
        ("Straße", "strasse"),
        ("STRAẞE", "strasse"),
        ("Łódź", "lodz"),
        ("Smørrebrød", "smorrebrod"),
        ("Ærlig Æther ÆSIR", "aerlig_aether_aesir"),
        ("Đorđe", "dorde"),
        ("Þór Eiðsson", "thor_eidsson"),
        ("Œuvre cœur", "oeuvre_coeur"),
        ("Diyarbak\N{LATIN SMALL LETTER DOTLESS I}r İzmir", "diyarbakir_izmir"),
        ("Ħamrun Ŧ ŋ", "hamrun_t_ng"),
        ("Ĳssel", "ijssel"),
        ("Həcər", "hecer"),
        ("Ɖuɛ Kɔfi Ɓɗ", "due_kofi_bd"),
        ("Čeština ŽŠ ő ű ș ț", "cestina_zs_o_u_s_t"),
        ("ÅNGSTRÖM å", "angstrom_a"),
        ("e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT}", "ete"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER V}\N{FULLWIDTH LATIN SMALL LETTER I}p", "vip"),
        ("Hawai\N{MODIFIER LETTER TURNED COMMA}i", "hawaii"),
        # digits and symbols
        ("\N{ARABIC-INDIC DIGIT SEVEN} days", "7_days"),
        ("x\N{SUPERSCRIPT TWO} \N{DINGBAT NEGATIVE CIRCLED DIGIT ONE}", "x2_1"),
        ("\N{VULGAR FRACTION ONE HALF} price", "1_2_price"),
        ("A\N{EN DASH}B", "a_b"),
        ("Mon\N{NO-BREAK SPACE}Fri", "mon_fri"),
        ("\N{FIRE} Hot \N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}", "hot"),
        ("__x__", "x"),
    ],
)
def test_a_key_is_derived_from_a_name(name, key):
    assert key_from_name(name) == key


@pytest.mark.parametrize("name", ["", "   ", "\N{FIRE}", "-_-", "!?"])
def test_a_name_without_letters_or_digits_asks_for_a_key(name):
    with pytest.raises(ConfigError, match="key = "):
        key_from_name(name)


@pytest.mark.parametrize(
    ("name", "letter"),
    [
        ("VIP клиенты", "к"),
        ("Йога", "Й"),
        ("Πελάτες VIP", "Π"),
        ("VIP 顧客", "顧"),
        ("30日以内に注文完了", "日"),
        ("VIP 고객", "고"),
        ("לקוחות VIP", "ל"),
        ("عملاء VIP", "ع"),
        ("VIP ग्राहक", "ग"),
        ("5 \N{MICRO SIGN}m", "\N{MICRO SIGN}"),
        ("aǝb", "ǝ"),
    ],
)
def test_a_letter_that_cannot_be_transliterated_asks_for_a_key(name, letter):
    with pytest.raises(
        ConfigError, match=f"name .*: {letter} cannot be written with a to z. Set a key, for example key = "
    ):
        key_from_name(name)


@given(st.text(max_size=30))
def test_no_letter_is_lost(name):
    try:
        key = key_from_name(name)
    except ConfigError:
        assume(False)
    counted = [each for each in name if unicodedata.category(each)[0] in "LN"]
    modifiers = [each for each in counted if unicodedata.name(each).startswith("MODIFIER LETTER")]
    assert len(key.replace("_", "")) >= len(counted) - len(modifiers)


def test_a_long_name_is_refused_quickly():
    assert key_from_name("a" * 200) == "a" * 200
    with pytest.raises(ConfigError, match="at most 200 characters, this one 201"):
        key_from_name("a" * 201)
    with pytest.raises(ConfigError, match="at most 200"):
        key_from_name("A" * 1_000_000)


def test_a_name_whose_key_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="at most 200"):
        key_from_name("\N{LATIN SMALL LIGATURE FFI}" * 100)


@given(st.text(max_size=200))
def test_a_derived_key_derives_itself(name):
    try:
        key = key_from_name(name)
    except ConfigError:
        assume(False)
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", key)
    assert key_from_name(key) == key == check_key(key)


@pytest.mark.parametrize(
    "key", ["vip", "a", "1", "first_time_shopper", "_private", "a__b", "30days", "x" * 200]
)
def test_a_key_set_by_hand_is_not_changed(key):
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "VIP", "a b", "a-b", "é", "_", "a\n", "x" * 201, "٣"])
def test_an_invalid_key_is_refused_with_the_rule(key):
    with pytest.raises(ConfigError, match=r"lower-case letters .* digits and underscores"):
        check_key(key)
