"""Which addresses a client may name, and which of the network's are connected to."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tercet.roles.gateway.fetch_rules import URL_CHARS, AllowedDomains, NotAllowed, is_public, parsed
from tercet.spec import GatewayImagesSpec


def checked(url, domains):
    domains.check(made := parsed(url))
    return made


DOMAINS = AllowedDomains(["img.example.com", "*.cdn.example", "10.1.2.3", "files.example:8080", "*.lab.example:8443"])


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001::1", "64:ff9b::8.8.8.8"],
)
def test_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "255.255.255.255"),
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1"),
        *("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192"),  # clouds' metadata
        *("192.0.0.9", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
        *("224.0.0.1", "239.255.255.255", "240.0.0.1"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "::ffff:0:127.0.0.1"),
        *("64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8"),
        *("2002:7f00:1::", "2002:808:808::1", "2001:0:7f00:1::", "2001:db8::1", "3fff::1", "100::1", "5f00::1"),
        *("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", ""),  # no addresses as a network has them
    ],
)
def test_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "https://img.example.com/a.png",
        "http://img.example.com/a.png?size=large#top",
        "HTTPS://IMG.EXAMPLE.COM:443/",
        "http://img.example.com.:80",
        "https://a.cdn.example/a",
        "https://b.a.cdn.example/a",
        "http://10.1.2.3/",  # by name; its address is looked at when it is connected to
        "http://files.example:8080/",
        "https://x.lab.example:8443/",
    ],
)
def test_allowed(url):
    assert str(checked(url, DOMAINS)).lower().startswith(url[:20].lower())


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://example.com/a.png", "'example.com' is not among gateway.images.allowed_media_domains"),
        ("https://cdn.example/", "'cdn.example' is not among"),
        ("https://evilcdn.example/", "is not among"),
        ("https://img.example.com.evil.net/", "is not among"),
        ("https://aimg.example.com/", "is not among"),
        ("https://img.example.com:8080/", "'img.example.com' with port 8080 is not among"),
        ("https://img.example.com:22/", "with port 22 is not among"),
        ("https://img.example.com:0/", "with port 0 is not among"),
        ("https://files.example/", "is not among"),
        ("https://img.example.com@evil.net/", "user or a password"),
        ("https://user:secret@img.example.com/", "user or a password"),
        ("https://evil.net\\@img.example.com/", "is no URL"),
        ("https://evil.net#@img.example.com/", "'evil.net' is not among"),
        ("https://img.example.com:99999/", "is no URL"),
        ("https://[::1/", "is no URL"),
        ("https://[::1]/", "'::1' is not among"),
        ("https:///a.png", "'' is not among"),
        ("https://a..cdn.example/", "is not among"),
        ("https://.cdn.example/", "is not among"),
        (f"https://{'a' * 64}.cdn.example/", "is not among"),
        (f"https://{'a.' * 130}cdn.example/", "is not among"),
        ("https://a\r\nHost: b.cdn.example/", "is no URL"),
        ("https://a b.cdn.example/", "is not among"),
        ("https://img.example.com/a\r\nX: y", "is no URL"),
        ("https:/\t/img.example.com/", "is no URL"),
        (f"https://{'ä' * 4000}.cdn.example/", "is no URL"),  # 18 ms to read
        ("https://\ud800.cdn.example/", "is no URL"),
        ("ftp://img.example.com/a", "not 'ftp'"),
        ("file:///etc/passwd", "not 'file'"),
        ("gopher://img.example.com/", "not 'gopher'"),
        ("//img.example.com/a", "not ''"),
        ("https://img.example.com/" + "a" * URL_CHARS, f"more than {URL_CHARS} characters"),
    ],
)
def test_not_allowed(url, told):
    with pytest.raises(NotAllowed, match=told) as raised:
        checked(url, DOMAINS)
    assert "secret" not in str(raised.value)


def test_a_name_of_other_letters_is_known_by_its_ascii_form():
    assert checked("https://exämple.com/", AllowedDomains(["xn--exmple-cua.com"])).raw_host == "xn--exmple-cua.com"
    with pytest.raises(NotAllowed):
        checked("https://\u0435xample.com/", AllowedDomains(["example.com"]))  # a Cyrillic letter


@pytest.mark.parametrize(
    "domain", ["", "*", "*.", "https://a.com", "a.com/", "A.com", "a.com:", "[::1]", "a b", "*a.com"]
)
def test_domains_that_a_spec_may_not_have(domain):
    with pytest.raises(ValidationError):
        GatewayImagesSpec(allowed_media_domains=[domain])
