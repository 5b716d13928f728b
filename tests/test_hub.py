"""Names of the Hugging Face hub, against a server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants

from jaxlm.config import SourceConfig
from jaxlm.data.records import check_source, read_records
from jaxlm.errors import UserError
from jaxlm.hub import HubName, model_files, pinned, read_address, upload
from jaxlm.locate import find_base, on_disk, record_base
from tests.hub_server import Hub, forget, running_hub

MODEL = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b"{  }",
    "README.md": b"# A model",
    "model.safetensors.index.json": b"{   }",
    "model-00001-of-00002.safetensors": b"a" * 3000,
    "model-00002-of-00002.safetensors": b"b" * 2000,
    "consolidated.safetensors": b"c" * 5000,
    "pytorch_model.bin": b"d" * 5000,
    "onnx/model.onnx": b"e",
    "tf_model.h5": b"f",
    "modeling_own.py": b"import os",
}
SAFE = [name for name in MODEL if name.startswith("model-") or name == "model.safetensors.index.json"]
SMALL = ["config.json", "generation_config.json", "tokenizer.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with running_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_read_is_downloaded_and_only_once(hub: Hub) -> None:
    commit = hub.push("org/name", MODEL)
    small = on_disk("hf://org/name", "small", "tokenizer")
    assert sorted(hub.downloaded()) == SMALL
    folder = on_disk("hf://org/name")
    assert folder == small and folder.name == commit
    assert files_of(folder) == {name: MODEL[name] for name in sorted([*SMALL, *SAFE])}
    asked = len(hub.requests)
    assert on_disk("org/name") == on_disk(f"hf://org/name@{commit}") == folder
    assert len(hub.requests) == asked, "a process asks once"
    forget()
    assert on_disk(f"hf://org/name@{commit}") == folder
    assert len(hub.requests) == asked, "a commit that is there needs no network"


def test_a_folder_of_that_name_is_taken_before_the_hubs(hub: Hub, tmp_path: Path) -> None:
    hub.push("org/name", MODEL)
    assert on_disk("org/name") != Path("org/name")
    (tmp_path / "org/name").mkdir(parents=True)
    assert on_disk("org/name") == Path("org/name") and on_disk("org/other") == Path("org/other")
    assert on_disk("hf://org/name").parts[-2] == "snapshots"


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "consolidated.00.pth"], None),
        (["params.json", "consolidated.00.pth", "consolidated.01.pth"], None),
        (["llama.ckpt"], None),
        (
            ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"],
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        (["checkpoints/4/jaxlm/model.json", "checkpoints/4/model/d/1", "checkpoints/4/commit_success.txt"], None),
        (["config.json", "model.safetensors", "jaxlm_experts/partition.npy"], None),
    ],
)  # fmt: skip
def test_weights_are_taken_in_the_format_that_is_read(names: list[str], weights: list[str] | None) -> None:
    expected = names if weights is None else weights
    if weights is None and names[0].startswith("pytorch"):
        expected = names[:2]
    assert model_files([*names, ".gitattributes", "README.md"], "", "model") == sorted(expected)
    below = model_files([f"sub/{name}" for name in names] + ["model.safetensors"], "sub", "model")
    assert below == sorted(f"sub/{name}" for name in expected)


def test_a_file_of_a_repository_is_a_tokenizer(hub: Hub) -> None:
    hub.push("org/name", {"old/tokenizer.model": b"x", "old/tokenizer_config.json": b"{}", "model.safetensors": b"y"})
    file = on_disk("hf://org/name/old/tokenizer.model", "small")
    assert file.read_bytes() == b"x" and hub.downloaded() == ["old/tokenizer.model", "old/tokenizer_config.json"]


def test_a_broken_download_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.push("org/name", {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 100})
    hub.broken["model.safetensors"] = 10_000
    folder = on_disk("hf://org/name")
    ranges = [request.range for request in hub.requests if request.path.endswith("model.safetensors") and request.range]
    assert "bytes=10000-" in ranges
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256)) * 100


def test_a_download_that_was_killed_goes_on_with_what_is_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.push("org/name", MODEL)
    import huggingface_hub.file_download as theirs

    get = theirs.http_get

    def dies(url: str, *arguments: object, **options: object) -> None:
        if url.endswith("model-00002-of-00002.safetensors"):
            raise KeyboardInterrupt
        get(url, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(theirs, "http_get", dies)
    with pytest.raises(KeyboardInterrupt):
        on_disk("hf://org/name")
    monkeypatch.setattr(theirs, "http_get", get)
    forget()
    before = hub.downloaded()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is not in the cache as a whole"):
        on_disk(f"hf://org/name@{commit}")  # what is there is not taken for all
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.requests.clear()
    folder = on_disk("hf://org/name")
    assert files_of(folder) == {name: MODEL[name] for name in sorted([*SMALL, *SAFE])}
    assert not set(hub.downloaded()) & set(before) and "model-00002-of-00002.safetensors" in hub.downloaded()


def test_what_the_hub_refuses_says_what_to_do(hub: Hub) -> None:
    commit = hub.push("org/name", MODEL)
    hub.push("org/empty", {"README.md": b""})
    hub.push("org/secret", MODEL)
    hub.push("org/busy", MODEL)
    hub.refusals |= {"org/secret": (403, "GatedRepo"), "org/expired": (403, ""), "org/busy": (429, "")}
    for path, message in {
        "hf://org/none": r"model: hf://org/none: the hub has no such repository, or it is private .* hf auth login",
        "hf://org/secret": r"a licence to accept first: do that at http://127.* log in here with hf auth login",
        "hf://org/expired": r"the hub refuses with status 403; log in again",
        "hf://org/busy": r"refuses with status 429; try again later, or where the network reaches it, run hf download",
        "hf://org/name@v9": r"the repository has no branch, tag or commit v9; see http",
        f"hf://org/name@{'0' * 40}": r"the repository has no branch, tag or commit 0000",
        "hf://org/empty": r"holds no file of a model; it has README\.md",
        "hf://org/name/none": r"holds no file of a model",
        "hf://name": r"model: hf://name: expected hf://owner/name, hf://owner/name@revision or hf://datasets",
        "hf://spaces/org/name": r"a space is neither a model nor data",
        "hf://datasets/org/name": r"is a data set, expected a model",
        "org/none": r"^org/none: no such directory or file .*, and as a name on the Hugging Face hub: .* no such repo",
        "s3://bucket/model": r"only the records of data are read from s3://; copy it here",
    }.items():
        with pytest.raises(UserError, match=message):
            on_disk(path)
    hub.other_commit = "1" * 40
    with pytest.raises(UserError, match=rf"hf://org/name@{commit}: the hub sent .* of another commit"):
        on_disk("hf://org/name")


def test_without_a_network_the_cache_is_enough_or_the_command_is_told(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.push("org/name", MODEL)
    folder = on_disk("hf://org/name", "small")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    nowhere = {"ENDPOINT": "http://127.0.0.1:9", "HUGGINGFACE_CO_URL_TEMPLATE": "http://127.0.0.1:9/{repo_id}"}
    for change in ({"HF_HUB_OFFLINE": True}, nowhere):
        for name, value in change.items():
            monkeypatch.setattr(constants, name, value)
        forget()
        asked = len(hub.requests)
        assert on_disk("hf://org/name", "small") == folder, "the tokenizer is there"
        with pytest.raises(UserError) as caught:
            on_disk("hf://org/name")  # the weights are not
        said = str(caught.value)
        assert "is not in the cache as a whole" in said and f"run hf download org/name --revision {folder.name}" in said
        with pytest.raises(UserError, match=r"run hf download org/other --local-dir other, bring the folder here"):
            on_disk("hf://org/other")
        assert ("HF_HUB_OFFLINE forbids the network" in said) == ("HF_HUB_OFFLINE" in change)
        assert len(hub.requests) == asked
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_client_that_another_thread_closed_cannot_connect(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hub library closes the client of all its threads where one of them cannot connect."""
    hub.push("org/name", MODEL)
    on_disk("hf://org/name", "small")
    closed = httpx2.Client()
    closed.close()
    for module in ("utils._http", "hf_api"):
        monkeypatch.setattr(f"huggingface_hub.{module}.get_session", lambda: closed)
    with pytest.raises(UserError, match=r"the hub cannot be reached \(no connection\); the same command again"):
        on_disk("hf://org/name")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    with pytest.raises(UserError, match=r"the hub cannot be reached \(no connection\); the same command again"):
        upload(HubName("model", "org/other"), tmp_path, ["config.json"], False, None, "message")


def test_a_name_always_means_the_same_commit_within_a_process(hub: Hub) -> None:
    first = hub.push("org/name", MODEL)
    assert pinned(HubName("model", "org/name"), "k").revision == first
    second = hub.push("org/name", MODEL | {"config.json": b"{\n}"})
    assert on_disk("hf://org/name", key="k").name == first
    forget()
    assert on_disk("hf://org/name").name == second
    assert on_disk(f"hf://org/name@{first}").name == first


def test_an_adapter_records_its_base_by_name_and_commit(hub: Hub, tmp_path: Path) -> None:
    commit = hub.push("org/name", MODEL)
    folder = on_disk("hf://org/name")
    for base in ("hf://org/name", "org/name", f"hf://org/name@{commit}", str(folder)):
        recorded = record_base(base, tmp_path)
        assert recorded == {"base": f"hf://org/name@{commit}"}
    assert find_base(recorded, tmp_path) == folder


def test_data_sets_are_read_by_file_folder_and_pattern(hub: Hub) -> None:
    line = '{{"text": "{}"}}\n'.format
    commit = hub.push("datasets/org/rocks", {
        "README.md": b"about", "data/train-0.jsonl": line("a").encode(), "data/train-1.jsonl": line("b").encode(),
        "data/test-0.jsonl": line("c").encode(),
    })  # fmt: skip

    def texts(path: str) -> str:
        source = SourceConfig(path=path)
        check_source(source)
        return "".join(record.data["text"] for record in read_records(source))

    assert texts("hf://datasets/org/rocks/data/train-0.jsonl") == "a"
    assert texts("hf://datasets/org/rocks/data/train-*.jsonl") == "ab"
    assert "data/test-0.jsonl" not in hub.downloaded()
    assert texts(f"hf://datasets/org/rocks@{commit}/data") == "cab", "test-0 comes first"
    with pytest.raises(
        UserError, match=r"several splits \(test, train\); name the files of one, or a pattern, e\.g\. hf://datasets"
    ):
        texts("hf://datasets/org/rocks")
    with pytest.raises(UserError, match=r"the repository has no such file; it has data/test-0\.jsonl, "):
        texts("hf://datasets/org/rocks/data/dev.jsonl")
    with pytest.raises(UserError, match=r"is a model; a data set is hf://datasets/"):
        texts("hf://org/rocks")
    hub.push("datasets/org/one", {"README.md": b"about", "all.txt": b"x\ny\n"})
    assert texts("hf://datasets/org/one") == "xy"


def test_addresses_are_written_as_they_are_read() -> None:
    for text in ("hf://org/name", "hf://org/name@v1/sub", "hf://datasets/org/name@a%2Fb/x/*.json", "hf://org/n@main"):
        assert str(read_address(text, "k")) == text
    assert read_address("https://huggingface.co/org/name/tree/main", "k") == HubName("model", "org/name", "main")
