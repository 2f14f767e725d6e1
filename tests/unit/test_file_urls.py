"""Signed URLs of images: what opens them, until when, and at which address."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from alphalayer.api.file_urls import UrlSigner, file_url
from alphalayer.core.errors import Forbidden

KEY = "alpha_1_0123456789ab.png"
DAY = 86_400


def parts(signer: UrlSigner, key: str = KEY) -> tuple[int, str]:
    query = parse_qs(urlsplit(file_url("https://images.example.com/x", key, signer)).query)
    return int(query["expires"][0]), query["signature"][0]


def signer_at(now: float, secret: bytes = b"s" * 16) -> UrlSigner:
    return UrlSigner(secret, DAY, lambda: now)


def test_file_url_without_signer_has_no_query():
    assert file_url("http://host", KEY) == f"http://host/alpha/v1/file/{KEY}"


def test_signed_url_is_valid_for_its_lifetime_and_stable():
    start = 10.5 * DAY
    expires, signature = parts(signer_at(start))
    assert parts(signer_at(start + 3600)) == (expires, signature)
    assert signer_at(start + DAY).check(KEY, expires, signature) > 0
    with pytest.raises(Forbidden, match="expired"):
        signer_at(start + 2 * DAY).check(KEY, expires, signature)


@pytest.mark.parametrize("now", [0.0, DAY - 1.0, float(DAY), 20_000.5 * DAY])
def test_signed_url_lifetime_has_bounds(now: float):
    expires, signature = parts(signer_at(now))
    assert DAY <= signer_at(now).check(KEY, expires, signature) <= 2 * DAY


def test_check_refuses_changed_parts():
    signer = signer_at(0)
    expires, signature = parts(signer)
    other = parts(signer_at(0, b"t" * 16))[1]
    for key, until, text in (
        ("alpha_1_0123456789ac.png", expires, signature),
        (KEY, expires + 1, signature),
        (KEY, expires, signature[:-1]),
        (KEY, expires, "é"),
        (KEY, expires, ""),
        (KEY, expires, other),
    ):
        with pytest.raises(Forbidden, match="signature of the URL is wrong"):
            signer.check(key, until, text)
    for until, text in ((None, signature), (expires, None), (None, None)):
        with pytest.raises(Forbidden, match="not signed"):
            signer.check(KEY, until, text)
