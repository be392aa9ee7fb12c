"""What is refused on the way to the Hugging Face Hub and back, in one line and with nothing changed."""

import copy
import subprocess
import sys
from pathlib import Path

import hub_double
import pytest
import torch
from hub_places import TENSORS, assert_same_vectors, in_cache, push

import onelora_compile as onelora


def test_a_pickle_alone_is_no_adapter(hub, trained, tmp_path):
    onelora.save_adapter(trained[1], tmp_path / "a", format="peft")
    (tmp_path / "a" / TENSORS).rename(tmp_path / "a" / "adapter_model.bin")
    hub.holds("user/name", tmp_path / "a")
    with pytest.raises(onelora.AdapterFileError, match=r"pickles are not opened.*adapter_model\.bin"):
        onelora.read_adapter("user/name")


def test_a_base_is_no_adapter_and_the_message_lists_what_is_there(hub, trained, tmp_path):
    hub.holds("user/base", tmp_path, into="adapters/one/")  # holds a.safetensors
    with pytest.raises(onelora.AdapterFileError, match=r"holds no adapter: neither .*adapters/one/a\.safetensors"):
        onelora.load_adapter(trained[0], "user/base")
    with pytest.raises(onelora.AdapterFileError, match="holds no adapter in other"):
        onelora.load_adapter(trained[0], "user/base", subfolder="other")


def test_another_base_is_refused_and_left_as_it_was(hub, trained):
    push(trained[1])
    other = copy.deepcopy(trained[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(onelora.BaseMismatchError, match="owner/a"):
        onelora.load_adapter(other, "owner/a")
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("user/nothing", r"Hub does not give a repository of that id.*(Repository|authenticated)"),
        ("user/name..x", r"Hub does not give.*Cannot have -- or \.\."),
        ("runs/a.safetensors", "there is no adapter file runs/a.safetensors$"),
        ("./runs/best", "there is no adapter file runs/best$"),
        ("runs/best/a", "there is no adapter file runs/best/a$"),
        ("best", "there is no adapter file best$"),
    ],
)
def test_what_is_neither_here_nor_there(name, why, hub, trained):
    with pytest.raises(FileNotFoundError, match=why) as caught:
        onelora.load_adapter(trained[0], name)
    assert name.removeprefix("./") in str(caught.value)
    assert bool(hub.requests) == (name == "user/nothing")


def test_offline_without_a_copy(cache, trained):
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder user/name, and the Hugging Face Hub.*HF_HUB_OFFLINE"
    ):
        onelora.load_adapter(trained[0], "user/name")


def test_a_hub_that_is_down_gives_what_is_in_the_cache_or_says_so(hub, trained):
    push(trained[1])
    onelora.read_adapter("owner/a")
    hub.down = True
    assert_same_vectors(onelora.read_adapter("owner/a").vectors, trained[1])
    with pytest.raises(FileNotFoundError, match=r"owner/b.*503"):
        onelora.read_adapter("owner/b")
    with pytest.raises(onelora.HubError, match=r"owner/a was not pushed.*503"):
        push(trained[1])


@pytest.mark.parametrize("subfolder", ["../b", "/b", "a/../../b"])
def test_a_subfolder_stays_inside(subfolder, cache):
    for name in ("user/name", "."):
        with pytest.raises(onelora.ConfigError, match="leads out of the folder"):
            onelora.read_adapter(name, subfolder=subfolder)


NO_IDS = ["name", "a/b/c", "owner/a.safetensors", "../a", "", None, Path("owner/a"), "owner/a b"]


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_id_is_not_pushed(name, hub, trained):
    with pytest.raises(onelora.ConfigError, match="is no id"):
        push(trained[1], name)
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "token", "why"),
    [("owner/a", None, "401"), ("owner/a", "hf_other", "401"), ("stranger/a", hub_double.TOKEN, "403.*stranger")],
)
def test_a_push_that_is_refused_is_one_error(name, token, why, hub, trained):
    with pytest.raises(onelora.HubError, match=rf"{name} was not pushed.*{why}"):
        onelora.push_to_hub(trained[1], name, token=token)
    assert name not in hub.repositories


def test_a_card_that_the_hub_refuses_changes_nothing_there(hub, trained):
    push(trained[1])
    before = hub.files("owner/a")
    with pytest.raises(onelora.HubError, match="not a valid model id"):
        push(trained[1], card="---\nbase_model: /home/me/base\n---\n")
    assert hub.files("owner/a") is before


def test_a_push_offline_is_one_error(cache, trained):
    with pytest.raises(onelora.HubError, match=r"owner/a was not pushed.*offline"):
        onelora.push_to_hub(trained[1], "owner/a")


def test_what_can_not_be_saved_is_not_pushed(hub, trained):
    with pytest.raises(onelora.ConfigError, match="format='gguf'"):
        push(trained[1], format="gguf")
    with pytest.raises(onelora.StateError, match="was not given to adapt"):
        push(trained[0])
    next(iter(onelora.vectors(trained[1]).values())).data.fill_(float("nan"))
    with pytest.raises(onelora.AdapterFileError, match="NaN"):
        push(trained[1])
    assert not hub.requests


def test_a_device_and_a_signature_want_files(cache, trained, tmp_path):
    from onelora_compile.exporters import sign_adapter

    in_cache(cache, "user/name", trained[2])
    with pytest.raises(FileNotFoundError, match="there is no file user/name"):
        sign_adapter("user/name", tmp_path / "key.pem")


def test_without_huggingface_hub(trained):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import torch, onelora_compile as onelora\n"
        "model = onelora.adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)))\n"
        "for call in (onelora.load_adapter, onelora.push_to_hub, onelora.model_card):\n"
        "    try: call(model, 'user/name')\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kinds = ["FileNotFoundError there is no file or folder user/name", "MissingExtraError", "MissingExtraError"]
    for line, kind in zip(done.stdout.splitlines(), kinds, strict=True):
        assert line.startswith(kind)
        assert "pip install 'onelora-compile[hf]'" in line
