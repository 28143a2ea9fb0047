"""A report names neither the person nor the machine, and carries no secret."""

import getpass
import socket

import pytest

from common.doctor.redact import is_secret, redact, redact_all


@pytest.fixture
def someone(monkeypatch, tmp_path):
    """A user and a machine with telling names."""
    monkeypatch.setenv("HOME", "/home/ada.lovelace")
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "ada.lovelace")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine-7.analytical.org")
    assert getpass.getuser() == "ada.lovelace"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/home/ada.lovelace/data/train.json", "~/data/train.json"),
        ("/scratch/ada.lovelace/zarr", "/scratch/<user>/zarr"),
        ("no answer from engine-7.analytical.org:80", "no answer from <host>:80"),
        ("engine-7 died", "<host> died"),
        ("https://ada:secret@mirror.org/simple", "https://<login>@mirror.org/simple"),
        ("token hf_AbCdEfGhIjKlMnOp is invalid", "token <token> is invalid"),
        ("--engine-arg hf_token=sesame, x", "--engine-arg hf_token=<secret>, x"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer <token>"),
        ("mail to ada.lovelace@engine-7", "mail to <user>@<host>"),
        ("ada.lovelace 2.60.0 is a package", "ada.lovelace 2.60.0 is a package"),
        ("/home/ada.lovelace2/x", "/home/ada.lovelace2/x"),
    ],
)
def test_what_is_taken_out(someone, text, wanted):
    assert redact(text) == wanted


def test_nested_values_and_names_are_redacted(someone):
    found = redact_all({"/home/ada.lovelace": ["hf_AbCdEfGhIjKlMnOp", 3, None, {"x": "engine-7"}]})
    assert found == {"~": ["<token>", 3, None, {"x": "<host>"}]}


@pytest.mark.parametrize(
    ("name", "secret"),
    [("HF_TOKEN", True), ("VLLM_API_KEY", True), ("AWS_SECRET", True), ("HF_HOME", False)],
)
def test_names_of_secrets(name, secret):
    assert is_secret(name) == secret
