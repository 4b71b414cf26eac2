"""No secret survives, whatever the address looks like; text without secrets is not touched."""

import copy
import json
import pickle
from dataclasses import asdict
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minilora.run.settings import TrainConfig
from minilora.system.redaction import Address, hide_secrets, whole, without_secrets

NAMES = st.text("abcxyz019_-", min_size=1, max_size=12)
# Ten letters that no part of an address around them has, and separators that should have been encoded.
LETTERS = st.text("QRSTUVW", min_size=10, max_size=30)
RAW = st.builds(
    lambda a, odd, b: f"{a}{odd}{b}", LETTERS, st.sampled_from(list("/?#;,@:!$&'()*+= %")), LETTERS
)
SCHEMES = st.sampled_from(["https://", "s3://", "gs://", "HTTPS://", "git+https://"])
WAYS = {
    "user and password": "{scheme}{name}:{secret}@{host}/{path}",
    "key pair": "{scheme}{secret}:{secret}@{host}/{path}",
    "token": "{scheme}{secret}@{host}/{path}",
    "query": "{scheme}{host}/{path}?X-Amz-Signature={secret}&b={secret}",
    "query without a path": "{scheme}{host}?{secret}",
    "fragment": "{scheme}{host}/{path}#access_token={secret}",
    "parameter": "{scheme}{host}/{path};token={secret}",
    "session": "{scheme}{host}/{path};jsessionid={secret}",
    "port": "{scheme}{name}:{secret}@{host}:8080/{path}",
    "everything": "{scheme}{secret}:{secret}@{host}/{path};token={secret}?sig={secret}#{secret}",
}


def parts(secret: str) -> list[str]:
    """The runs of five letters and more in a secret."""
    return [run for run in "".join(c if c in "QRSTUVW" else " " for c in secret).split() if len(run) > 4]


@pytest.mark.parametrize("way", WAYS)
@given(scheme=SCHEMES, name=NAMES, secret=LETTERS, host=NAMES, path=NAMES, before=NAMES)
def test_a_secret_leaves_every_text_and_host_and_path_stay(way, scheme, name, secret, host, path, before):
    address = WAYS[way].format(scheme=scheme, name=name, secret=secret, host=host, path=path)
    for text in (
        f"{before} {address} behind",
        f"{before}: '{address}', behind",
        f"{before}={address} behind",
    ):
        shown = without_secrets(text)
        assert secret not in shown
        assert shown.startswith(before) and shown.endswith("behind") and f"{scheme}{host}" in shown
        assert path in shown or "{path}" not in WAYS[way]


@pytest.mark.parametrize("way", ["user and password", "port"])
@given(scheme=SCHEMES, name=NAMES, secret=RAW, host=NAMES, path=NAMES)
def test_a_password_with_separators_that_should_have_been_encoded_is_not_shown_either(
    way, scheme, name, secret, host, path
):
    address = Address(WAYS[way].format(scheme=scheme, name=name, secret=secret, host=host, path=path))
    assert not any(part in address for part in parts(secret))


@pytest.mark.parametrize("way", WAYS)
@given(scheme=SCHEMES, name=NAMES, secret=LETTERS | RAW, host=NAMES, path=NAMES)
def test_a_text_without_secrets_is_not_cut_again(way, scheme, name, secret, host, path):
    once = Address(WAYS[way].format(scheme=scheme, name=name, secret=secret, host=host, path=path))
    assert without_secrets(once) == once


@given(secret=st.text(min_size=1), host=NAMES)
def test_any_percent_encoded_password_is_cut_out_and_kept_whole(secret, host):
    encoded = quote(secret, safe="")
    address = Address(f"https://me:{encoded}@{host}/a.jsonl?sig={encoded}")
    assert address == f"https://{host}/a.jsonl"
    assert whole(address) == f"https://me:{encoded}@{host}/a.jsonl?sig={encoded}"


@given(secret=LETTERS, weights=st.booleans(), names=st.lists(NAMES, min_size=2, max_size=4))
def test_every_address_in_a_mixture_of_datasets_loses_its_secret_and_none_is_lost(secret, weights, names):
    weight = ":0.5" if weights else ""
    mixture = ",".join(f"https://me:{secret}@{name}/a.jsonl{weight}" for name in names)
    assert Address(mixture) == ",".join(f"https://{name}/a.jsonl{weight}" for name in names)


@given(secret=LETTERS)
def test_no_way_of_writing_an_address_shows_its_secret(secret):
    address = Address(f"https://me:{secret}@host/a?b={secret}")
    config = TrainConfig(
        dataset=whole(address), eval_dataset=[whole(address)], model_name_or_path=whole(address)
    )
    written = [
        str(address), repr(address), f"{address}", f"{address!r:>99}", format(address), "".join([address, "x"]),
        json.dumps({"a": address, address: 1}), pickle.dumps(address).decode("latin-1"), repr(copy.deepcopy(address)),
        repr(copy.copy(address)), address + "x", address.upper(), repr(config), repr(asdict(config)),
        json.dumps(asdict(config)), config.to_yaml(), str(ValueError(address)),
    ]  # fmt: skip
    assert not any(secret in text or secret.lower() in text.lower() for text in written)
    assert whole(config.dataset) == whole(config.eval_dataset[0]) == whole(address)
    assert yaml.safe_load(config.to_yaml())["dataset"] == "https://host/a"


@given(secret=st.text("QRSTUVW2345678", min_size=10, max_size=40), before=NAMES)
def test_tokens_headers_and_named_secrets_are_cut_out_of_any_text(secret, before):
    for text in (
        f"hf_{secret}", f"Authorization: Bearer {secret}", f"Basic {secret}", f"token={secret}", f"?api_key={secret}&b=1",
        f"--access_token={secret}", f"PASSWORD={secret}", f"a;sig={secret};b",
    ):  # fmt: skip
        assert secret not in without_secrets(f"{before} {text} behind")


@pytest.mark.parametrize(
    "text",
    [
        "https://host:5000/a/b", "mistralai/Mistral-7B-v0.1", "me@host.org", "q_proj, v_proj", "sqlite:////a b/c.db",
        "hf://datasets/owner/name@main/a.jsonl", "s3://bucket/a@2x.png", "abfs://container@account/a", "C:\\a\\b",
        "names eos_token='</s>', which its vocabulary lacks", "a.jsonl:0.7,https://host/b.jsonl:0.3", "why? because; #1",
    ],
)  # fmt: skip
def test_text_without_secrets_stays_as_it_is(text):
    assert without_secrets(text) == text == hide_secrets(text)
    assert isinstance(hide_secrets(text), Address) == ("://" in text)
