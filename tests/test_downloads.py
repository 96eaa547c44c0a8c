"""Downloads from a local server that breaks connections, changes its files and redirects."""

import hashlib
import json
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax import downloads
from imgcap_jax.errors import UserError
from imgcap_jax.files import cache_folder

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(file_server: Any) -> Any:
    file_server.files["/weights.pth"] = CONTENT
    return file_server


def fetch(url: str, path: Path, **options: Any) -> Path:
    return downloads.fetch(url, path, **{"by_hand": "copy it here", "elsewhere": "use another folder", **options})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def visible(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def test_file_is_downloaded_once(server: Any, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{server.base}/weights.pth"
    assert fetch(url, path, sha256=SHA256[:8]) == path
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == ["weights.pth"]
    out, err = capsys.readouterr()
    assert (out, "weights.pth" in err) == ("", True)
    fetch(url, path)
    assert server.asked == [("/weights.pth", None)]


def test_broken_connection_is_resumed(server: Any, path: Path) -> None:
    server.limits = [1000, 2000, None]
    fetch(f"{server.base}/weights.pth", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=1000-", "bytes=3000-"]


def test_stalled_connection_is_resumed(server: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_STALLED_SECONDS", 0.5)
    server.limits, server.delay = [1000, None], 2.0
    fetch(f"{server.base}/weights.pth", path)
    assert path.read_bytes() == CONTENT
    # On a busy machine, another response may seem stalled.
    assert [wanted for _, wanted in server.asked][:2] == [None, "bytes=1000-"]


def broken_off(server: Any, path: Path) -> str:
    """Leaves 1000 bytes of the file, as after a process that gave up; returns the URL."""
    server.limits = [1000, 0]
    url = f"{server.base}/weights.pth"
    with pytest.raises(UserError, match=r"weights\.pth stopped after 0\.0 MB \(the server closed the connection\)"):
        fetch(url, path)
    assert visible(path.parent) == ["weights.pth.part", "weights.pth.part.json"]
    server.limits, server.asked = [None], []
    return url


def test_next_process_resumes(server: Any, path: Path) -> None:
    fetch(broken_off(server, path), path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == ["bytes=1000-"]
    assert visible(path.parent) == ["weights.pth"]


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("changed", [CONTENT[::-1], CONTENT + b"more", CONTENT[:500]])
def test_changed_file_is_downloaded_from_scratch(
    honours_if_range: bool, changed: bytes, server: Any, path: Path
) -> None:
    url = broken_off(server, path)
    server.files["/weights.pth"], server.honours_if_range = changed, honours_if_range
    fetch(url, path)
    assert path.read_bytes() == changed


def test_part_of_another_url_is_not_used(server: Any, path: Path) -> None:
    broken_off(server, path)
    server.files["/other.pth"] = CONTENT[::-1]
    fetch(f"{server.base}/other.pth", path)
    assert path.read_bytes() == CONTENT[::-1]
    assert server.asked == [("/other.pth", None)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record[:11],
        lambda record: b"\xff" + record,
        lambda record: b"[" * 100_000,
        lambda record: json.dumps(json.loads(record) | {"version": ["x"]}).encode(),
        lambda record: json.dumps(json.loads(record) | {"size": "1000", "sha256": 5}).encode(),
    ],
)
def test_damaged_record_restarts_the_download(damage: Callable[[bytes], bytes], server: Any, path: Path) -> None:
    url = broken_off(server, path)
    record = path.parent / "weights.pth.part.json"
    record.write_bytes(damage(record.read_bytes()))
    fetch(url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/weights.pth", None)]


def test_complete_part_is_not_requested_again(server: Any, path: Path) -> None:
    url = broken_off(server, path)
    (path.parent / "weights.pth.part").write_bytes(CONTENT)
    fetch(url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.asked == []


def test_failing_server_is_retried_a_limited_number_of_times(server: Any, path: Path) -> None:
    server.limits, server.statuses = [1000], [0, 503, 0, 503]
    with pytest.raises(UserError, match=r"stopped after .* \(the server answers 503 Service Unavailable\)"):
        fetch(f"{server.base}/weights.pth", path)
    resumed = ["bytes=1000-"] * 2 + ["bytes=2000-"] * 9
    assert [wanted for _, wanted in server.asked] == [None, *resumed]


def test_wrong_checksum_is_an_error_and_leaves_no_files(server: Any, path: Path) -> None:
    with pytest.raises(UserError, match=rf"its SHA-256 starts with {SHA256[:8]}, not with 01234567"):
        fetch(f"{server.base}/weights.pth", path, sha256="01234567")
    assert visible(path.parent) == []


def test_pauses_grow_once_data_has_arrived(
    server: Any, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 2.0)
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: slept.append(seconds) if seconds else None)
    server.limits = [0]
    with pytest.raises(UserError, match="stopped after 0"):
        fetch(f"{server.base}/weights.pth", path)
    assert slept == [2, 4, 8]  # nothing has arrived yet
    slept.clear()
    server.limits = [1000, 0]
    with pytest.raises(UserError, match="stopped after"):
        fetch(f"{server.base}/weights.pth", path)
    assert slept == [2, 2, 4, 8, 16, 32, 60, 60, 60]
    assert "trying again in 32 seconds" in caplog.text


@pytest.mark.parametrize("hashed", [False, True])
def test_a_process_that_is_killed_while_it_checks_does_not_download_again(
    hashed: bool, server: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    url = f"{server.base}/weights.pth"
    with monkeypatch.context() as patch:
        patch.setattr(*((downloads.os, "replace") if hashed else (downloads, "file_digest")), interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(url, path, sha256=SHA256)
    fetch(url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/weights.pth", None)]
    assert visible(path.parent) == ["weights.pth"]


def test_checking_a_download_shows_progress(server: Any, path: Path, progress_lines: list[str]) -> None:
    server.files["/weights.pth"] = bytes(3_000_000)
    fetch(f"{server.base}/weights.pth", path)
    assert any(line.startswith("checking weights.pth: 1/3 MB") for line in progress_lines)


@pytest.mark.parametrize("right", [True, False])
def test_checksum_published_by_the_hub_is_checked(right: bool, server: Any, path: Path) -> None:
    published = SHA256 if right else SHA256[::-1]
    server.redirects["/resolve"] = ("/weights.pth", published)
    if right:
        fetch(f"{server.base}/resolve", path)
        assert path.read_bytes() == CONTENT
    else:
        with pytest.raises(UserError, match="SHA-256"):
            fetch(f"{server.base}/resolve", path)
        assert not path.exists()


def test_redirected_download_is_resumed(server: Any, path: Path) -> None:
    server.redirects["/resolve"] = ("/weights.pth", SHA256)
    server.limits = [1000, None]
    fetch(f"{server.base}/resolve", path)
    assert path.read_bytes() == CONTENT
    assert server.asked[-1] == ("/weights.pth", "bytes=1000-")


def test_redirect_away_from_https_is_refused(server: Any, path: Path) -> None:
    insecure = f"http://localhost:{server.server_port}/weights.pth"
    server.redirects["/resolve"] = (insecure, SHA256)
    with pytest.raises(UserError, match=rf"{insecure} is refused: files whose SHA-256 is not known are .* https only"):
        fetch(f"{server.base}/resolve", path, sha256=SHA256[:63])
    assert server.asked == [("/resolve", None)]
    assert not path.exists()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/w.pth", "http://download.pytorch.org/w", "file:///etc/passwd", "ftp://x/y"]
)
def test_urls_without_https_are_refused(url: str, path: Path) -> None:
    with pytest.raises(UserError, match="over https only"):
        fetch(url, path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/y"])
def test_a_checksum_admits_http_only(url: str, path: Path) -> None:
    with pytest.raises(UserError, match="over https only"):
        fetch(url, path, sha256=SHA256)


def test_a_checksum_admits_http(server: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_is_secure", lambda url: url.startswith("https:"))
    server.redirects["/resolve"] = (f"{server.base}/weights.pth", "")
    fetch(f"{server.base}/resolve", path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    server.files["/weights.pth"] = CONTENT[::-1]
    with pytest.raises(UserError, match="is not the published file: its SHA-256"):
        fetch(f"{server.base}/resolve", path.with_name("other"), sha256=SHA256)


def test_a_file_of_another_size_is_refused_before_it_is_received(server: Any, path: Path) -> None:
    server.files["/weights.pth"] = b"<html>log in</html>"
    with pytest.raises(UserError, match=r"the server sends 19 bytes instead of 102,400; check the connection"):
        fetch(f"{server.base}/weights.pth", path, size=len(CONTENT))
    assert visible(path.parent) == []


def test_a_server_without_ranges_sends_the_whole_file_again(
    server: Any, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = broken_off(server, path)
    server.ranges = False
    fetch(url, path, sha256=SHA256, size=len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert caplog.messages == [f"{url}: the server sends the whole file again instead of the rest"]


def test_offline_message_says_what_to_do(server: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_is_secure", lambda url: True)
    with socket.create_server(("127.0.0.1", 0)) as closed_again:
        url = f"http://127.0.0.1:{closed_again.getsockname()[1]}/models/weights.pth"
    with pytest.raises(downloads.DownloadError) as raised:
        fetch(url, path)
    assert str(raised.value) == f"{url} can't be downloaded (Connection refused); copy it here"
    assert visible(path.parent) == []


def test_missing_file_is_not_retried(server: Any, path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth can't be downloaded \(the server answers 404 Not Found\)"):
        fetch(f"{server.base}/absent.pth", path)
    assert len(server.asked) == 1


def test_full_disk_is_a_user_error(server: Any, path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path.parent.mkdir()
    (path.parent / "weights.pth.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cache: the disk is full; free some space .* or use another folder$"):
        fetch(f"{server.base}/weights.pth", path)
    assert not path.exists()


def test_concurrent_downloads_fetch_the_file_once(server: Any, path: Path) -> None:
    server.delay = 0.1
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(f"{server.base}/weights.pth", path, sha256=SHA256), range(4)))
    assert path.read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_download_without_a_version_is_not_resumed(server: Any, path: Path) -> None:
    url = broken_off(server, path)
    record = path.parent / "weights.pth.part.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"version": ""}))
    fetch(url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/weights.pth", None)]


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMGCAP_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("weights") == tmp_path / ".cache" / "imgcap_jax" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_folder("weights") == tmp_path / ".cache" / "imgcap_jax" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("weights") == tmp_path / "xdg" / "imgcap_jax" / "weights"
    monkeypatch.setenv("IMGCAP_CACHE", str(tmp_path / "own"))
    assert cache_folder("weights") == tmp_path / "own" / "weights"


def test_a_record_of_size_0_without_its_part_is_ignored(server: Any, tmp_path: Path) -> None:
    record = {"url": server.base + "/weights.pth", "version": '"1"', "size": 0, "sha256": ""}
    (tmp_path / "w.pth.part.json").write_text(json.dumps(record))
    assert fetch(server.base + "/weights.pth", tmp_path / "w.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["w.pth", "w.pth.part", "w.pth.part.json", ".w.pth.lock"])
def test_a_folder_in_the_place_of_a_file_is_one_line(name: str, server: Any, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "content").touch()
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*: Is a directory; check this path and run"):
        fetch(server.base + "/weights.pth", tmp_path / "w.pth")
