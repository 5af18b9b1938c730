"""Templates find values of rows, and links and numbers are formatted."""

import pytest

from audience_sync.web.render import environment, link, number


def rendered(template, **values):
    return environment().from_string(template).render(values)


@pytest.mark.parametrize("name", ["items", "get", "values", "keys"])
def test_a_value_with_the_name_of_a_method_of_dicts_does_not_hide_it(name):
    traits = {name: "<b>", "plan": "pro"}
    assert rendered("{{ traits.plan }} {{ traits['plan'] }}", traits=traits) == "pro pro"
    assert rendered(f"{{{{ traits.{name} is callable }}}}", traits=traits) == "True"
    items = "{% for name, value in traits.items() %}{{ name }}={{ value }} {% endfor %}"
    assert rendered(items, traits=traits) == f"{name}=&lt;b&gt; plan=pro "


def test_a_link_has_the_parameters_that_are_set():
    assert link("/runs", key=None, status="") == "/runs"
    assert link("/user", id="a b&c=d/é", before=0) == "/user?id=a+b%26c%3Dd%2F%C3%A9&before=0"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (99_999, "99,999"), (100_000, "100,000+"), (250_000, "100,000+")],
)
def test_a_number_says_where_counting_stopped(value, text):
    assert number(value, 100_000) == text
    assert number(250_000) == "250,000"
