# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev.formats.layer_file import LAYER_FORMATS
from blockdev.formats.limits import Limits
from snapshotter import config
from snapshotter.config import Config, parse, parse_size
from snapshotter.contracts import CONTRACTS
from snapshotter.errors import ConfigError

DEFAULT_FILE = Path(__file__).parents[2] / "config" / "config.toml"
DEFAULT_TEXT = DEFAULT_FILE.read_text()
HOST = '[snapshotters.mine]\ncontract = "host"\nformat = "tar-index"\n'


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def flat(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def test_an_empty_file_is_the_default() -> None:
    assert parse("") == Config()


def test_the_default_file_holds_the_default_of_every_key() -> None:
    written = flat(tomllib.loads(DEFAULT_TEXT))
    built_in = flat(msgspec.to_builtins(Config()))
    assert written == built_in
    assert {key: type(value) for key, value in written.items()} == {key: type(value) for key, value in built_in.items()}
    assert config.load(DEFAULT_FILE) == Config()


def test_every_key_of_the_default_file_has_a_comment() -> None:
    lines = DEFAULT_TEXT.splitlines()
    keys = [number for number, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    for number in keys:
        above = next(line for line in reversed(lines[:number]) if "=" not in line or line.startswith("#"))
        assert above.startswith("#"), lines[number]


@pytest.mark.parametrize("number", [n for n, line in enumerate(DEFAULT_TEXT.splitlines()) if " = " in line])
def test_any_key_may_be_left_out_but_a_snapshotters_two(number: int) -> None:
    lines = DEFAULT_TEXT.splitlines()
    removed = lines.pop(number)
    text = "\n".join(lines)
    if removed.startswith(("contract", "format")):
        assert removed.partition(" ")[0] in refused(text)
    else:
        assert parse(text) == Config()


def test_every_key_can_be_set() -> None:
    chosen = parse(
        'root = "/r"\naddress = "/a.sock"\n'
        '[containerd]\naddress = "/c.sock"\ncontent = "/c"\n'
        '[builds]\nworkers = 5\nsharing = "namespace"\ntimeout = 7\nmax_layer_size = "1GiB"\nmax_entries = 10\n'
        'max_path_length = 100\nmax_xattr_size = "1KiB"\nmax_expansion_ratio = 50\nfree_space_reserve = "0"\n'
        '[cache]\nmax_size = "0"\n[host]\nmount_through = "loop"\n[metrics]\naddress = ""\n[log]\nlevel = "debug"\n'
        '[snapshotters.one]\ncontract = "host"\nformat = "tar-index"\nmax_layers = 59\nremap_ids = true\n'
        '[snapshotters."two and / more"]\ncontract = "host"\nformat = "tar-index"\n'
    )
    assert (chosen.root, chosen.address) == ("/r", "/a.sock")
    assert (chosen.containerd.address, chosen.containerd.content) == ("/c.sock", "/c")
    assert (chosen.builds.workers, chosen.builds.sharing, chosen.builds.timeout) == (5, "namespace", 7.0)
    assert (chosen.cache.max_size, chosen.metrics.address, chosen.log.level) == ("0", "", "debug")
    # A table of one's own replaces the default's name.
    assert list(chosen.snapshotters) == ["one", "two and / more"]
    assert chosen.host.mount_through == "loop"
    one, two = chosen.snapshotters.values()
    assert (one.max_layers, one.remap_ids) == (59, True)
    assert (two.max_layers, two.remap_ids) == (CONTRACTS["host"].MAX_LAYERS, False)
    limits = chosen.builds.limits()
    assert (limits.tar_bytes, limits.entries, limits.path_bytes) == (1 << 30, 10, 100)
    assert (limits.xattr_bytes, limits.expansion_ratio) == (1024, 50)


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ('roto = "/r"', "roto", "root"),
        ('adress = "/a"', "adress", "address"),
        ("[build]\nworkers = 1", "build", "builds"),
        ("[snapshotter.mine]", "snapshotter", "snapshotters"),
        ('[containerd]\nadress = "/a"', "containerd.adress", "address"),
        ("[builds]\nwokers = 1", "builds.wokers", "workers"),
        ('[builds]\nmax_layers_size = "1"', "builds.max_layers_size", "max_layer_size"),
        ('[cache]\nmaxsize = "1"', "cache.maxsize", "max_size"),
        ('[metrics]\nadres = ""', "metrics.adres", "address"),
        ('[log]\nlvl = "info"', "log.lvl", "level"),
        (HOST + 'formt = "x"', "snapshotters.mine.formt", "format"),
        (
            '[snapshotters.a]\ncontract = "host"\nformat = "tar-index"\n' + HOST + "contact = 1",
            "mine.contact",
            "contract",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(text: str, key: str, near: str) -> None:
    message = refused(text)
    assert "unknown key" in message
    assert key in message
    assert near in message.partition("did you mean")[2]


@pytest.mark.parametrize("text", ["zzzz = 1", "[builds]\nqqqq = 1", HOST + "zzzz = 1", "[zzzz.qqqq]\nx = 1"])
def test_an_unknown_key_like_no_other_gets_no_suggestion(text: str) -> None:
    message = refused(text)
    assert "unknown key" in message
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("root = 5", "root"),
        ("address = []", "address"),
        ("containerd = 1", "containerd"),
        ("builds = []", "builds"),
        ('[builds]\nworkers = "2"', "builds.workers"),
        ("[builds]\nworkers = 2.5", "builds.workers"),
        ("[builds]\nworkers = true", "builds.workers"),
        ('[builds]\ntimeout = "1"', "builds.timeout"),
        ("[builds]\nmax_layer_size = 5", "builds.max_layer_size"),
        ('[builds]\nsharing = "all"', "builds.sharing"),
        ("[cache]\nmax_size = 0", "cache.max_size"),
        ("[metrics]\naddress = 9476", "metrics.address"),
        ('[log]\nlevel = "loud"', "log.level"),
        ('[host]\nmount_through = "file"', "host.mount_through"),
        (HOST + "max_layers = 0", "snapshotters.mine"),
        (HOST + "remap_ids = 1", "snapshotters.mine"),
        ("root = 2026-01-01", "root"),
        ("snapshotters = 1", "snapshotters"),
        ("[snapshotters]\nmine = 1", "snapshotters"),
        ('[snapshotters.mine]\ncontract = 1\nformat = "tar-index"', "contract"),
    ],
)
def test_a_wrong_type_is_refused_and_its_key_named(text: str, key: str) -> None:
    assert f"`{key}" in refused(text) or f".{key}`" in refused(text)


def test_a_name_cannot_take_more_layers_than_its_contract() -> None:
    most = CONTRACTS["host"].MAX_LAYERS
    assert parse(HOST + f"max_layers = {most}").snapshotters["mine"].max_layers == most
    message = refused(HOST + f"max_layers = {most + 1}")
    assert "snapshotters.mine.max_layers" in message
    assert str(most) in message


KATA = '[snapshotters.tardev]\ncontract = "kata-tardev"\nformat = "tar-index"\n'
AZURE = '[snapshotters.azure]\ncontract = "kata-tardev"\nformat = "tarfs"\n'


def test_a_name_of_kata_has_a_directory_of_links() -> None:
    chosen = parse(KATA).snapshotters["tardev"]
    assert (chosen.encoding, chosen.max_layers, chosen.layers) == ("base64", 59, "")
    assert parse(KATA).links() == {"tardev": Path(Config().root, "layers")}
    assert parse(f'{KATA}layers = "/l/a"\nencoding = "plain"\n').links() == {"tardev": Path("/l/a")}
    assert parse(HOST).links() == {}
    two = parse(f'{KATA}layers = "/l/a"\n{AZURE}{AZURE.replace("azure", "third")}')
    assert two.links()["azure"] == two.links()["third"] == Path(Config().root, "layers")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"{KATA}{AZURE}", "snapshotters.azure.layers"),
        (f'{KATA}layers = "/l/a/"\n{AZURE}layers = "/l//a"\n', "another format"),
        (f'{KATA}layers = "l/a"\n', "absolute"),
        (f'{KATA}layers = "/l,a"\n', "comma"),
        (f'{KATA}layers = "/l:a"\n', "colon"),
        (f'{KATA}layers = "/l\\u0000"\n', "absolute"),
        (f'{KATA}layers = "/{"l" * 1024}"\n', "1024"),
        (f'root = "/r"\n{KATA}layers = "/r"\n', "/r/layers"),
        (f'root = "/r"\n{KATA}layers = "/r/staging"\n', "/r/layers"),
        (f'root = "/r"\n{KATA}layers = "/r/layers/tarfs"\n', "/r/layers"),
        (f'root = "/r"\n{KATA}layers = "/x/../r/snapshots/1"\n', "/r/links/"),
        (f'{KATA}encoding = "hex"\n', "base64, plain"),
        (f"{KATA}max_layers = 60\n", "59"),
        (f"{KATA}remap_ids = true\n", "remap_ids"),
        (f'{HOST}layers = "/l"\n', "snapshotters.mine.layers"),
        (f'{HOST}encoding = "plain"\n', "snapshotters.mine.encoding"),
        (HOST.replace("tar-index", "tarfs"), "tarfs"),
    ],
)
def test_what_a_name_of_kata_cannot_have(text: str, named: str) -> None:
    assert named in refused(text)


@pytest.mark.parametrize("missing", ["contract", "format"])
def test_a_snapshotter_that_lacks_a_key_is_named(missing: str) -> None:
    message = refused("\n".join(line for line in HOST.splitlines() if not line.startswith(missing)))
    assert missing in message
    assert "mine" in message


@pytest.mark.parametrize("contract", ["kata_tardev", "kata_erofs", "Host", ""])
def test_a_contract_that_this_version_lacks_is_named(contract: str) -> None:
    message = refused(f'[snapshotters.tardev]\ncontract = "{contract}"\nformat = "tar-index"\n')
    assert "snapshotters.tardev" in message
    assert repr(contract) in message
    assert all(name in message for name in CONTRACTS)


@pytest.mark.parametrize(
    ("layer_format", "blocks"), [("tar-index", "erofs, verity blocks of 512/4096"), ("tarfs", "tar, ver")]
)
def test_formats_that_upstreams_agent_cannot_verify_are_refused(layer_format: str, blocks: str) -> None:
    message = refused(f'[snapshotters.tardev-kata]\ncontract = "kata-erofs"\nformat = "{layer_format}"\n')
    assert f"contract kata-erofs cannot use format {layer_format} (file system {blocks}" in message
    assert "it can use: erofs-4k (file system erofs, verity blocks of 4096/4096 bytes)" in message


@pytest.mark.parametrize(
    ("contract", "layer_format", "size", "reason"),
    [
        ("kata-erofs", "erofs-4k", "10 MB", "'10 MB' is no size"),
        ("kata-erofs", "erofs-4k", "1023KiB", "a file system has 1048576 bytes or more"),
        ("kata-tardev", "tarfs", "1GiB", "contract kata-tardev has nothing to write to"),
        ("host", "tar-index", "1GiB", "contract host has nothing to write to"),
    ],
)
def test_a_file_system_to_write_to_that_cannot_be(contract: str, layer_format: str, size: str, reason: str) -> None:
    text = f'[snapshotters.mine]\ncontract = "{contract}"\nformat = "{layer_format}"\nwritable_size = "{size}"\n'
    assert f"snapshotters.mine.writable_size: {reason}" in refused(text)


def test_what_upstreams_kata_gets_where_nothing_is_said() -> None:
    text = '[snapshotters.mine]\ncontract = "kata-erofs"\nformat = "erofs-4k"\n'
    found = parse(text).snapshotters["mine"]
    assert (found.max_layers, found.encoding, found.writable_size) == (128, "", "0")
    assert parse(text).links() == {}
    for wrong in ("max_layers = 129", "remap_ids = true", 'encoding = "plain"', 'layers = "/l"'):
        assert wrong.split()[0] in refused(text + wrong)


@pytest.mark.parametrize("layer_format", ["tarfs-genpolicy", "erofs", "tar_index", ""])
def test_a_format_that_this_version_lacks_is_named(layer_format: str) -> None:
    message = refused(f'[snapshotters.tardev-azl]\ncontract = "host"\nformat = "{layer_format}"\n')
    assert "snapshotters.tardev-azl" in message
    assert repr(layer_format) in message
    assert all(name in message for name in LAYER_FORMATS)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('root = ""', "root"),
        ('root = "var/lib"', "root"),
        ('address = "a.sock"', "address"),
        ('address = ""', "address"),
        pytest.param('address = "/' + "a" * 107 + '"', "107", id="address of 108 bytes"),
        pytest.param('address = "/' + "ü" * 60 + '"', "107", id="address of 121 bytes in 61 characters"),
        ("[builds]\nworkers = 0", "workers"),
        ("[builds]\nworkers = -1", "workers"),
        ("[builds]\ntimeout = 0", "timeout"),
        ("[builds]\ntimeout = -1.5", "timeout"),
        ("[builds]\ntimeout = nan", "timeout"),
        ("[builds]\nmax_entries = -1", "max_entries"),
        ("[builds]\nmax_path_length = -1", "max_path_length"),
        ("[builds]\nmax_expansion_ratio = -1", "max_expansion_ratio"),
        ('[builds]\nmax_layer_size = "big"', "max_layer_size"),
        ('[builds]\nmax_xattr_size = "-1"', "max_xattr_size"),
        ('[builds]\nfree_space_reserve = "5%"', "free_space_reserve"),
        ('[cache]\nmax_size = "20GB"', "max_size"),
        ("[snapshotters]", "snapshotters"),
        # No path of the kernel's holds a NUL, no option of overlay's a comma or a bare colon.
        ('root = "/a\\u0000b"', "root"),
        ('root = "/a,b"', "root"),
        ('root = "/a:b"', "root"),
        ('root = "/a\\\\b"', "root"),
    ],
)
def test_a_value_that_cannot_work_is_refused_and_named(text: str, named: str) -> None:
    assert named in refused(text)


def test_an_address_as_long_as_a_unix_sockets_may_be() -> None:
    assert parse('address = "/' + "a" * 106 + '"').address.endswith("a")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1KiB", 1 << 10),
        ("512MiB", 512 << 20),
        ("20GiB", 20 << 30),
        ("20 GiB", 20 << 30),
        ("2TiB", 2 << 40),
        ("007KiB", 7 << 10),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "-1", "+1", "1.5GiB", "1e9", "0x10", "1_000", "20GB", "20G", "20gib", "20iB", "20 GiB ", " 1",
     "1 2", "1GiBGiB", "9" * 5000, "9" * 5000 + "GiB"],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


def test_the_bound_of_attributes_is_never_above_the_formats() -> None:
    assert parse('[builds]\nmax_xattr_size = "1GiB"').builds.limits().xattr_bytes == Limits().xattr_bytes


@pytest.mark.parametrize(
    "text",
    [
        "root",
        "root =",
        'root = "/a"\nroot = "/b"',
        "[builds]\n[builds]",
        "\0",
        "root = 'a\nb'",
        "x = " + "[" * 100_000,
        "[builds]\nmax_entries = " + "9" * 5000,
        "root = 2026-99-99",
    ],
)
def test_what_is_no_toml_is_refused_without_a_trace(text: str) -> None:
    assert refused(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "latin1.toml"
    bad.write_bytes(b'root = "/\xff"')
    for path in (tmp_path / "absent.toml", tmp_path, bad):
        with pytest.raises(ConfigError, match=str(path)):
            config.load(path)


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("roto = 1\n")
    with pytest.raises(ConfigError, match=f"{path}: unknown key roto"):
        config.load(path)


PIECES = st.sampled_from(
    ["", " ", "\n", "=", '"', "'", "[", "]", "[[", ".", "#", "0", "-1", "nan", "inf", "true", "1979-05-27", "{}",
     "\\", "\0", "snapshotters", "contract", "builds", "root", "x", "ü", '"""']
)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), PIECES), min_size=1, max_size=4))
def test_any_mutation_of_the_default_file_is_read_or_refused(changes: list[tuple[float, int, str]]) -> None:
    text = DEFAULT_TEXT
    for where, length, piece in changes:
        at = int(where * len(text))
        text = text[:at] + piece + text[at + length :]
    with suppress(ConfigError):
        assert parse(text).snapshotters


def test_a_skipped_download_is_off_and_goes_with_no_sharing_by_namespace() -> None:
    assert not parse("").snapshotters["tardev-host"].skip_download
    table = '[snapshotters.x]\ncontract = "host"\nformat = "tar-index"\nskip_download = true\n'
    assert parse(table).snapshotters["x"].skip_download
    with pytest.raises(ConfigError, match=r"snapshotters\.x\.skip_download.*sharing"):
        parse('[builds]\nsharing = "namespace"\n' + table)
