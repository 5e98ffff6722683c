"""data/fineweb.py against a stand-in of the hub on this machine: HF_ENDPOINT names it, so that no network is needed."""
import hashlib
import json
import random
import re
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "data"), str(Path(__file__).resolve().parent)]

import fineweb  # noqa: E402
from test_data_prepare import assert_one_line_error, read_shard, run_script, snapshot  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VAL, TRAIN1, TRAIN2, TRAIN3 = fineweb.shard_names(3)


def shard(seed, tokens=20_000, magic=20240520, **header):
    rng = random.Random(seed)
    values = [50256 if i % 1000 == 0 else rng.randrange(50256) for i in range(tokens)]
    return struct.pack("<256i", magic, 1, header.get("count", tokens), *[0] * 253) + struct.pack(f"<{tokens}H", *values)


FILES = {name: shard(name) for name in (VAL, TRAIN1, TRAIN2, TRAIN3)}


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the hub for a data set: the list of files, and each file from any byte on."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)  # what is sent
        self.listed = dict(FILES)  # what the list of files is made from
        self.break_once, self.refuse, self.requests = set(), set(), []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self):
        return [(name, start) for method, name, start in self.requests if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        if path == f"/api/datasets/{fineweb.REPO}/revision/main":
            return self.send_list(hub)
        match = re.fullmatch(f"/datasets/{fineweb.REPO}/resolve/{COMMIT}/(.*)", path)
        if not match or match[1] in hub.refuse:
            return self.send(403 if match else 404, b"{}", X_Error_Message="not here")
        data = hub.files[match[1]]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        hub.requests.append((self.command, match[1], start))
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha256(hub.listed[match[1]]).hexdigest()}"',
                   "Content_Length": len(data) - start}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and match[1] in hub.break_once:
            hub.break_once.remove(match[1])
            body = body[:len(body) // 2]  # the connection closes before Content-Length is reached
        self.send(206 if start else 200, body, **headers)

    do_HEAD = do_GET

    def send_list(self, hub):
        siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40,
                     "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
                    for name, data in hub.listed.items()]
        body = json.dumps({"id": fineweb.REPO, "sha": COMMIT, "siblings": siblings}).encode()
        self.send(200, body, Content_Type="application/json")


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetch(hub, tmp_path):
    """Run the script; .out is its folder. Settings of the user's own, caches and proxies do not reach it."""
    def call(*args, endpoint=None):
        return run_script("fineweb.py", *args, "--out", call.out, HF_ENDPOINT=endpoint or hub.url, HF_HUB_OFFLINE="0",
                          HF_HOME=str(tmp_path / "home"), NO_PROXY="127.0.0.1", no_proxy="127.0.0.1",
                          HF_HUB_ETAG_TIMEOUT="5")

    call.out = tmp_path / "fineweb10B"
    return call


def shards_in(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.bin")}


def test_download(hub, fetch):
    result = fetch("2")
    assert (result.returncode, result.stderr) == (0, "")
    assert shards_in(fetch.out) == {name: FILES[name] for name in (VAL, TRAIN1, TRAIN2)}
    manifest = json.loads((fetch.out / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["eot"]) == ("gpt2", 50257, 50256)
    assert manifest["options"] == {"repo": fineweb.REPO, "revision": "main", "commit": COMMIT}
    assert (manifest["tokens"], manifest["documents"]) == (60_000, 60)
    for name, record in manifest["shards"].items():
        tokens = read_shard(fetch.out / name)[1]
        assert record == {"tokens": len(tokens), "documents": tokens.count(50256), "bytes": len(FILES[name]),
                          "sha256": hashlib.sha256(FILES[name]).hexdigest(),
                          "mtime_ns": (fetch.out / name).stat().st_mtime_ns}
    assert sorted(manifest["shards"]) == sorted([VAL, TRAIN1, TRAIN2])


def test_second_call_needs_no_network_and_a_third_only_what_is_new(hub, fetch):
    assert fetch("1").returncode == 0
    result = fetch("1", endpoint="http://127.0.0.1:9")
    assert result.returncode == 0 and "complete already" in result.stdout
    hub.requests.clear()
    assert fetch("3").returncode == 0
    assert hub.gets() == [(TRAIN2, 0), (TRAIN3, 0)]
    assert shards_in(fetch.out) == FILES


def test_a_broken_transfer_is_resumed(hub, fetch):
    # The hub's library writes blocks of 10 MiB, and goes on behind the last whole one.
    large = struct.pack("<256i", 20240520, 1, 2**24, *[0] * 253) + bytes(range(256)) * 2**17
    hub.files[TRAIN1] = hub.listed[TRAIN1] = large
    hub.break_once = {TRAIN1}
    result = fetch("1")
    assert (result.returncode, result.stderr) == (0, "")
    starts = [start for name, start in hub.gets() if name == TRAIN1]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]  # the second request goes on where the first one broke off
    assert shards_in(fetch.out)[TRAIN1] == large


def test_the_same_command_continues(hub, fetch):
    hub.refuse = {TRAIN2}
    assert_one_line_error(fetch("3"), TRAIN2, "same command continues")
    assert shards_in(fetch.out) == {name: FILES[name] for name in (VAL, TRAIN1)}
    assert sorted(json.loads((fetch.out / "manifest.json").read_text())["shards"]) == sorted([VAL, TRAIN1])
    hub.refuse = set()
    hub.requests.clear()
    assert fetch("3").returncode == 0
    assert hub.gets() == [(TRAIN2, 0), (TRAIN3, 0)]
    assert shards_in(fetch.out) == FILES


@pytest.mark.parametrize("remembered", [True, False])
def test_a_damaged_file_is_fetched_again(hub, fetch, remembered):
    assert fetch("2").returncode == 0
    for name, data in [(TRAIN1, FILES[TRAIN1][:-1] + b"\0"), (VAL, FILES[VAL][:3000])]:
        (fetch.out / name).write_bytes(data)
    if not remembered:
        (fetch.out / "manifest.json").unlink()
    hub.requests.clear()
    result = fetch("2")
    assert (result.returncode, result.stderr) == (0, "")
    assert hub.gets() == [(VAL, 0), (TRAIN1, 0)]
    assert result.stdout.count("fetching it again") == 2
    assert shards_in(fetch.out) == {name: FILES[name] for name in (VAL, TRAIN1, TRAIN2)}


def test_files_that_are_there_already_are_kept(hub, fetch):
    """Downloaded in another way, without a manifest: checked, not fetched."""
    fetch.out.mkdir()
    for name in (VAL, TRAIN1):
        (fetch.out / name).write_bytes(FILES[name])
    assert fetch("1").returncode == 0
    assert hub.gets() == []
    assert len(json.loads((fetch.out / "manifest.json").read_text())["shards"]) == 2


def test_the_hub_sends_something_else(hub, fetch):
    hub.files[TRAIN1] = FILES[TRAIN1][:-2] + b"\7\7"
    assert_one_line_error(fetch("1"), TRAIN1, hashlib.sha256(FILES[TRAIN1]).hexdigest())
    assert list(shards_in(fetch.out)) == [VAL]
    assert [name for name, _ in hub.gets()] == [VAL, TRAIN1, TRAIN1]


@pytest.mark.parametrize("data", [shard(1, 50, magic=20240521), shard(1, 50, count=49), b"short"])
def test_the_hub_has_no_shard(hub, fetch, data):
    hub.files[VAL] = hub.listed[VAL] = data
    assert_one_line_error(fetch("1"), VAL, "token shard")
    assert not list(fetch.out.glob("*.bin")) and not (fetch.out / "manifest.json").exists()


def test_no_network(hub, fetch):
    assert fetch("1").returncode == 0
    before = snapshot(fetch.out)
    assert_one_line_error(fetch("2", endpoint="http://127.0.0.1:9"), fineweb.REPO, "network", "same command continues")
    assert snapshot(fetch.out) == before


@pytest.mark.parametrize("args, parts", [
    (["4"], ["fineweb_train_000004.bin", TRAIN3]),
    ([], ["fineweb_train_000004.bin"]),  # the default is all 103
    (["0"], ["N=0"]),
    (["few"], ["few", "--help"]),
    (["1", "--repo", "no/such"], ["no/such"]),
    (["1", "--revision", "none"], [fineweb.REPO]),
])
def test_errors(hub, fetch, args, parts):
    assert_one_line_error(fetch(*args), *parts)
    assert hub.requests == [] and not fetch.out.exists()


def test_other_shards_are_kept(fetch, tmp_path):
    (tmp_path / "a.txt").write_text("some\0text")
    assert run_script("prepare.py", tmp_path / "a.txt", "--out", fetch.out, "--tokenizer", "bytes").returncode == 0
    before = snapshot(fetch.out)
    assert_one_line_error(fetch("1"), fetch.out, "other shards")
    assert snapshot(fetch.out) == before


def test_a_full_disk_is_said_first(hub, fetch, monkeypatch, tmp_path):
    monkeypatch.setattr(fineweb, "import_hub", lambda: None)
    monkeypatch.setattr(fineweb, "remote_files", lambda *args: (COMMIT, {name: (10**18, None) for name in args[-1]}))
    with pytest.raises(fineweb.DataError, match="GB free"):
        fineweb.main(["1", "--out", str(fetch.out)])


def test_without_huggingface_hub(monkeypatch, fetch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(fineweb.DataError, match="pip install huggingface_hub"):
        fineweb.main(["1", "--out", str(fetch.out)])


def test_names():
    names = fineweb.shard_names(103)
    assert len(names) == 104 and names[0] == "fineweb_val_000000.bin"
    assert (names[1], names[-1]) == ("fineweb_train_000001.bin", "fineweb_train_000103.bin")


def test_help():
    result = run_script("fineweb.py", "--help")
    assert result.returncode == 0 and all(flag in result.stdout for flag in ["--out", "--repo", "--revision", "103"])
