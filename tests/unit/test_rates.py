"""Cost of jobs by key: what is charged, and what is not."""

from __future__ import annotations


import pytest

from alphalayer.auth.api_keys import Key
from alphalayer.auth.rates import KeyRates
from alphalayer.core.errors import InvalidRequest, RateLimited

KEY = Key(name="shop", sha256="0" * 64, cost_per_minute=100)


def test_charge_limits_the_cost_a_minute():
    rates = KeyRates(lambda: [KEY])
    rates.charge("shop", 60.5)
    with pytest.raises(RateLimited, match="100 megapixel-steps a minute"):
        rates.charge("shop", 60.5)
    rates.charge("shop", 38.5)
    with pytest.raises(InvalidRequest, match="costs 101 megapixel-steps"):
        rates.charge("shop", 101.0)
    rates.charge("removed meanwhile", 1e9)
