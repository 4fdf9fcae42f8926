"""What is known of a model when it is loaded: sizes, digest, device; and why it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes_hf import END, make_tiny_model

from promptmesh.providers import hf_load
from promptmesh.providers.hf_frames import Load
from promptmesh.providers.hf_load import (
    PAGE,
    LoadError,
    bytes_per_token,
    cache_tokens,
    choose_device,
    choose_dtype,
    end_tokens,
    load,
)
from promptmesh.providers.hf_weights import Notebook, weights_digest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny")


def order(model: str, **fields: Any) -> Load:
    sizes = {"device": "auto", "dtype": "auto", "threads": 1, "max_batch": 4, **fields}
    return Load(model=model, **sizes)


def silent(stage: str) -> None:
    pass


def test_what_is_told_of_a_model(tiny: Path) -> None:
    stages: list[str] = []
    model = load(order(str(tiny)), Notebook(None), stages.append)
    assert (model.id, model.device, model.dtype) == ("tiny", "cpu", "float32")
    assert model.context_length == 256
    assert model.cache_tokens == 4 * 512
    assert model.ends == {END}
    assert model.engine.startswith("transformers/5")
    assert "+torch/2" in model.engine
    assert not model.tools
    assert [stage.split()[0] for stage in stages] == ["reading", "loading", "checking"]


def test_the_context_can_be_capped(tiny: Path) -> None:
    assert load(order(str(tiny), max_context=100), Notebook(None), silent).context_length == 100
    assert load(order(str(tiny), max_context=10**6), Notebook(None), silent).context_length == 256


def test_the_dtype_can_be_chosen(tiny: Path) -> None:
    model = load(order(str(tiny), dtype="bfloat16"), Notebook(None), silent)
    assert model.model.dtype == torch.bfloat16
    assert choose_dtype("float32", CPU) == torch.float32
    for wrong in ("int8", "float33", "nn"):
        with pytest.raises(LoadError, match="no dtype"):
            choose_dtype(wrong, CPU)


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    for wrong in ("cuda", "cuda:1"):
        with pytest.raises(LoadError, match="torch sees 0") as caught:
            choose_device(wrong)
        assert "auto" in caught.value.hint
    with pytest.raises(LoadError, match="no device"):
        choose_device("abacus")
    with pytest.raises(LoadError, match="not supported"):
        choose_device("meta")


def test_a_card_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:1").index == 1
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16


SMOL = SimpleNamespace(
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576, num_hidden_layers=30
)


def test_the_cache_is_counted_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_per_token(SMOL, torch.float32) == 46_080
    assert bytes_per_token(SMOL, torch.bfloat16) == 23_040
    monkeypatch.setattr(hf_load, "free_memory", lambda device: 4 * 10**9)
    size = 46_080

    def tokens(context: int, **fields: Any) -> int:
        return cache_tokens(SMOL, torch.float32, CPU, context, order("m", **fields))

    # One whole context, or some tokens for each of a batch.
    assert tokens(8192) == 8192
    assert tokens(1000, max_batch=16) == 16 * 512
    # At most a quarter of what is free.
    assert tokens(10**6) == 10**9 // size // PAGE * PAGE
    # A share or a number of bytes, by setting; never more than the batch can use.
    assert tokens(10**6, memory=0.5) == 2 * 10**9 // size // PAGE * PAGE
    assert tokens(10**6, memory=10**8) == 10**8 // size // PAGE * PAGE
    assert tokens(100, memory=0.9, max_batch=2) == 224
    with pytest.raises(LoadError, match="memory"):
        tokens(100, memory=1000)


def test_all_end_tokens_count() -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    assert end_tokens(model, SimpleNamespace(eos_token_id=7)) == {3, 4, 7}
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert end_tokens(model, SimpleNamespace(eos_token_id=None)) == set()


def test_weights_that_are_not_there_are_told(tiny: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny, half)
    (half / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="half") as caught:
        load(order(str(half)), Notebook(None), silent)
    assert "whole" in caught.value.hint
    (half / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="half"):
        load(order(str(half)), Notebook(None), silent)


# --- the digest ---------------------------------------------------------------------------------


def digest(folder: Path, notebook: Notebook | None = None) -> str:
    return weights_digest(folder, notebook or Notebook(None), silent)


def test_the_digest_is_of_the_weights_and_what_computes_with_them(
    tiny: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    original = digest(tiny)
    assert original.startswith("sha256:")
    assert digest(copy) == original
    config = json.loads((copy / "config.json").read_text())
    config["transformers_version"] = "9.9"
    (copy / "config.json").write_text(json.dumps(config))
    assert digest(copy) == original
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert digest(copy) != original
    (copy / "config.json").write_text(json.dumps(config))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert digest(copy) != original


def test_a_digest_is_remembered_until_the_file_changes(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    notes = tmp_path / "notes"
    first = digest(copy, Notebook(str(notes)))
    path = notes / "local_hf.json"
    facts = json.loads(path.read_text())
    (key,) = facts
    # What is remembered is believed; that is how it can be seen.
    path.write_text(json.dumps({key: "0" * 64}))
    assert digest(copy, Notebook(str(notes))) != first
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert digest(copy, Notebook(str(notes))) not in (first, digest(tiny))


def test_a_notebook_that_cannot_be_read_or_written_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "local_hf.json").write_text("{")
    notebook = Notebook(str(tmp_path))
    assert notebook.recall("a") is None
    notebook.note("a", 1)
    assert Notebook(str(tmp_path)).recall("a") == 1
    (tmp_path / "file").write_text("")
    unwritable = Notebook(str(tmp_path / "file" / "folder"))
    unwritable.note("a", 2)
    assert unwritable.recall("a") == 2
    assert Notebook(None).recall("a") is None
